"""kvwire ships the cache of a hybrid language model between machines, verified byte for byte."""

__version__ = "0.1.0"
