"""Packed layers, their kernels, and the way from the simulation to them."""
