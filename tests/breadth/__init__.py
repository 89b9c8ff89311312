"""Every decoder family that the installed transformers knows, small, and what was seen of each."""
