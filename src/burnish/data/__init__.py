"""From files to examples: load, format, render with masks, prepare once, cut into windows."""
