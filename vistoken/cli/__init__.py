"""Command lines: argument handling only, the work is done elsewhere."""
