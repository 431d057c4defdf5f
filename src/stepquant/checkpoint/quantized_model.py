"""The methods of a model that quantized layers change, all in one place."""

from __future__ import annotations

from torch import nn

from stepquant.checkpoint.casts import allow_casts
from stepquant.runtime.layers.dtype_marker import count_as_float
from stepquant.runtime.layers.fusion import refuse_fusion


def adapt_methods(model: nn.Module, other_dtypes: bool) -> None:
    """Let the methods of `model` that read or change weights deal with its quantized layers.

    `num_parameters` counts as for the float model, `fuse_qkv_projections` is refused, and casts are
    those of `allow_casts`, which explains `other_dtypes`.
    """
    count_as_float(model)
    refuse_fusion(model)
    allow_casts(model, other_dtypes)
