"""Layers that hold quantized weights: integer, weight-only and dynamic ones, and LoRA branches."""
