"""Quantized layers, the kernels that run them, and fast blocks that pass codes between them."""
