"""stepquant: low-bit diffusion models that are smaller on disk and run in integer arithmetic.

Importing it teaches diffusers to load stepquant checkpoints with `from_pretrained`.
"""

from stepquant.checkpoint.plugin import register

__version__ = "0.1.0"

register()
