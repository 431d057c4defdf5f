"""stepquant: low-bit diffusion models that are smaller on disk and run in integer arithmetic.

Importing it teaches diffusers, and transformers if it is installed, to load stepquant checkpoints
with `from_pretrained`.
"""

from stepquant.checkpoint import plugin
from stepquant.support.version import __version__
from stepquant.weight_only import quantizers

__all__ = ["__version__"]

plugin.register()
quantizers.register()
