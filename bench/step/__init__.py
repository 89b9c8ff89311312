"""The parts of `bench/step.py`: what is raced, who races, and how it is judged."""
