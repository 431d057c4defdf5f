"""Training loops, optimizers and multi-step losses that several steps share."""
