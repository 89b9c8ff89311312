"""Reports that people read: the run as a page, and examples with their masks."""
