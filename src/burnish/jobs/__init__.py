"""Job files for schedulers: written, never submitted. `write.py` is the door."""
