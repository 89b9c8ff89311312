"""What `bench/gpu.py` runs, part by part."""
