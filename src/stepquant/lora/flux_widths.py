"""Widths of quantized layers for Flux's LoRA loader.

diffusers compares a LoRA's widths with the shapes of the weights, to widen the model for a control
LoRA and to pad a narrower LoRA for a control model. The weights of quantized layers have other
shapes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from stepquant.lora.peft_checks import quantized_layers
from stepquant.support.errors import StepQuantError

PREFIX = "transformer."
A = ".lora_A.weight"

Tensors = dict[str, Tensor]


def split(transformer: Any, tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Return the LoRA's `tensors` for all other layers, and those for quantized layers."""
    quantized = quantized_layers(transformer)
    own = {
        key: tensor
        for key, tensor in tensors.items()
        if key.removeprefix(PREFIX).partition(".lora_")[0] in quantized
    }
    return {key: tensor for key, tensor in tensors.items() if key not in own}, own


def widened(transformer: Any, tensors: Tensors) -> Tensors:
    """Return `tensors`, for quantized layers, with each matrix A padded to its layer's width.

    Raises:
        StepQuantError: a matrix reads more channels than its layer, as in a control LoRA.
    """
    layers, found = quantized_layers(transformer), dict(tensors)
    for key, tensor in tensors.items():
        if not key.endswith(A):
            continue
        name = key.removeprefix(PREFIX).removesuffix(A)
        more = layers[name].in_features - tensor.shape[1]
        if more < 0:
            raise StepQuantError(
                f"the LoRA has the shape {list(tensor.shape)} under '{key}', but the quantized "
                f"layer '{name}' reads {layers[name].in_features} channels: expected a LoRA for "
                "this model; for a control LoRA, which widens that layer, keep the layer in float"
            )
        found[key] = F.pad(tensor, (0, more))
    return found
