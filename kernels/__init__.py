"""GPU kernels, shipped as ``kvwire.kernels``."""
