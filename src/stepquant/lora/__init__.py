"""LoRAs: files, key names, and branches on a quantized pipeline."""
