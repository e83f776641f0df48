"""The fault campaign: what a run carries, the harm done to it, and the verdict."""
