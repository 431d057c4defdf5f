"""Fast versions of diffusers' blocks, which pass codes to their layers.

A fast block is the original module with its class replaced by a subclass that computes the same
result from the same submodules. Module names, hooks, configs and `isinstance` checks keep working.
If one of its layers cannot take codes, the block runs diffusers' own code. See also
`runtime.layers.prepared_layer`.
"""

from __future__ import annotations

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from stepquant.runtime.blocks.attention import FastAttention
from stepquant.runtime.blocks.attention_precision import AUTO
from stepquant.runtime.blocks.decoder import (
    FastAttnUpBlock2D,
    FastCrossAttnUpBlock2D,
    FastUpBlock2D,
)
from stepquant.runtime.blocks.projections import FastTransformer2DModel
from stepquant.runtime.blocks.resnet import FastResnetBlock2D
from stepquant.runtime.blocks.transformer import FastBasicTransformerBlock
from stepquant.runtime.blocks.upsample import FastUpsample2D

FAST_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    Attention: FastAttention,
    AttnUpBlock2D: FastAttnUpBlock2D,
    BasicTransformerBlock: FastBasicTransformerBlock,
    CrossAttnUpBlock2D: FastCrossAttnUpBlock2D,
    ResnetBlock2D: FastResnetBlock2D,
    Transformer2DModel: FastTransformer2DModel,
    UpBlock2D: FastUpBlock2D,
    Upsample2D: FastUpsample2D,
}
FAST_NAMES = {plain.__name__: fast.__name__ for plain, fast in FAST_CLASSES.items()}
PLAIN_CLASSES = {fast: plain for plain, fast in FAST_CLASSES.items()}


def use_fast_blocks(model: nn.Module) -> nn.Module:
    """Replace the classes of the blocks in the quantized `model` by their fast versions, in place.

    Returns `model`. Its own class stays, and so do blocks without a fast version.
    """
    for module in model.modules():
        fast = FAST_CLASSES.get(type(module))
        if fast is not None and module is not model:  # the model's class name is in its config
            module.__class__ = fast
            if isinstance(module, FastAttention):
                module.attention_precision = AUTO
    for names in ("_repeated_blocks", "_no_split_modules"):  # diffusers looks up class names here
        known = getattr(model, names, None)
        if known:
            fast_names = [FAST_NAMES[name] for name in known if name in FAST_NAMES]
            setattr(model, names, [*known, *(name for name in fast_names if name not in known)])
    return model


def use_plain_blocks(model: nn.Module) -> nn.Module:
    """Give the blocks of `model` their diffusers classes back, in place; returns `model`."""
    for module in model.modules():
        plain = PLAIN_CLASSES.get(type(module))
        if plain is not None:
            module.__class__ = plain
    return model
