"""Quantized layers (integer, weight-only, dynamic), quantized attention and LoRA branches."""
