"""The scheme of bits, and the float model's simulated and integer twins."""
