"""Fused operations between integer layers, and the specs and grids that describe a layer."""
