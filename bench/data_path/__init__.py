"""Parts of `bench/data.py`, some of which `bench/step.py` uses too."""
