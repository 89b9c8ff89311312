"""The demonstration: a tiny base model and instructions, made on the spot, through the real path."""
