"""Passes between integer layers, and what kernels and passes say of a layer: specs and grids."""
