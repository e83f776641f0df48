"""Triton kernels: portable, and the ones to read. The CUDA sources are held to the same results."""
