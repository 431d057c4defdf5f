"""LoRAs: their files, the names of their keys, and branches on a quantized pipeline."""
