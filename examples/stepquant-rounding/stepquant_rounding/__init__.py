"""Sigma-delta rounding of weights, as a plug-in of stepquant."""
