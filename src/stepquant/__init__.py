"""stepquant: low-bit diffusion models that are smaller on disk and run in integer arithmetic."""

__version__ = "0.1.0"
