"""Calibration data from the float model's sampler, and first ranges."""
