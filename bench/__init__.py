"""Measurements of kvwire against the ceilings of the same machine; see README.md."""
