"""Checks of whether a block may run its layers on codes and still get the same result."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from stepquant.runtime.layers.adapters import adapted_layer
from stepquant.runtime.layers.integer import FLOATS, IntegerLayer
from stepquant.runtime.layers.straight_through import wants_gradient
from stepquant.support.refusal import Refusal, RefusalCode

A_HOOK = Refusal(RefusalCode.HOOK, "a hook")
A_LORA = Refusal(RefusalCode.LORA, "a LoRA")
TRAINING = Refusal(RefusalCode.TRAINING, "training mode")
_BYPASS = Refusal(RefusalCode.INPUT_BYPASS, "the input error bypass")
_SEVERAL_PARTS = Refusal(RefusalCode.LAYER, "a layer with several input parts")


def is_encodable(x: Tensor) -> bool:
    """Whether the fused passes support `x`: on the CPU, in float32 or bfloat16."""
    return x.device.type == "cpu" and x.dtype in FLOATS


def follows_gradient(block: nn.Module, *inputs: Tensor | None) -> bool:
    """Whether one of `inputs` or a parameter of `block` needs a gradient.

    Codes have no gradient. The block then runs layer by layer, because a layer that gets floats
    propagates gradients.
    """
    if not torch.is_grad_enabled():
        return False
    return wants_gradient(*inputs) or any(each.requires_grad for each in block.parameters())


def untouched(module: nn.Module) -> bool:
    """Whether calling `module` runs only its class's `forward`: no hooks, and no patched method.

    accelerate's hooks patch `forward` on the instance.
    """
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in module.__dict__
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
    )


def why_no_codes(layer: nn.Module | None, parts: int | None = None) -> Refusal | None:
    """Why a block currently cannot run `layer` on codes with the same result, or None.

    The layer itself may refuse codes. A LoRA, a bypass and a hook prevent them as well, because
    they read the layer's float input.

    Args:
        layer: The layer; None, an absent layer, is no obstacle.
        parts: The number of input parts that the block can feed; None for any number.
    """
    if layer is None:
        return None
    if adapted_layer(layer) is not None:
        return A_LORA
    if not isinstance(layer, IntegerLayer):
        return Refusal(RefusalCode.LAYER, f"a layer of the class {type(layer).__name__}")
    if layer.lora is not None:
        return A_LORA
    if layer.bypass is not None:
        return _BYPASS
    if not untouched(layer):
        return A_HOOK
    if parts is not None and len(layer.splits) != parts:
        return _SEVERAL_PARTS
    return layer.why_no_codes()
