"""Adapters between serving engines and kvwire; each imports its engine only when used."""
