"""The quantization scheme, and conversion of the simulation to packed layers."""
