"""Whether a block may run its layers on codes to the same result as by calling them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from stepquant.runtime.layers.integer import FLOATS, IntegerLayer
from stepquant.runtime.layers.straight_through import wants_gradient
from stepquant.support.refusal import Refusal, RefusalCode

A_HOOK = Refusal(RefusalCode.HOOK, "a hook")
A_LORA = Refusal(RefusalCode.LORA, "a LoRA")
TRAINING = Refusal(RefusalCode.TRAINING, "training mode")
_BYPASS = Refusal(RefusalCode.INPUT_BYPASS, "an input error bypass")
_SEVERAL_PARTS = Refusal(RefusalCode.LAYER, "a layer with several input parts")


def is_encodable(x: Tensor) -> bool:
    """Whether the fused passes take `x`: on the CPU, in float32 or bfloat16."""
    return x.device.type == "cpu" and x.dtype in FLOATS


def follows_gradient(block: nn.Module, *inputs: Tensor | None) -> bool:
    """Whether autograd follows one of `inputs` or trains a part of `block`.

    Codes have no gradient. A block then runs layer by layer, because a layer that is called with
    floats passes gradients on.
    """
    if not torch.is_grad_enabled():
        return False
    return wants_gradient(*inputs) or any(each.requires_grad for each in block.parameters())


def untouched(module: nn.Module) -> bool:
    """Whether calling `module` is calling its `forward`: no hooks, none of accelerate's either."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in module.__dict__
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
    )


def why_no_codes(layer: nn.Module | None, parts: int | None = None) -> Refusal | None:
    """Why a block cannot run `layer` on codes now to the same result as by calling it, or None.

    `parts`: how many input parts the block can feed; None: any number. No layer at all is no
    obstacle. Besides the layer's own reasons there is whatever else looks at its float input: a
    LoRA, a bypass, a hook.
    """
    if layer is None:
        return None
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
