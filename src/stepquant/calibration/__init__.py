"""Calibration data from the float model's sampler, and initial quantizer ranges."""
