"""The backends: one file for each, found through entry points."""
