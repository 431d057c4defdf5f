"""What a recorded call takes for granted: it is true as long as that stays as it was."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from stepquant.models.input_bypass import InputBypass
from stepquant.models.non_finite import NonFiniteInputs
from stepquant.quantizers.step_grid import StepContext
from stepquant.runtime.layers.integer import IntegerLayer, is_packed
from stepquant.runtime.ops import native
from stepquant.support.refusal import Refusal, RefusalCode

NO_PRODUCTS = Refusal(RefusalCode.NO_PRODUCTS, "no native integer products on this machine")
KINDS = (
    *("_modules", "_parameters", "_buffers"),
    *("_forward_hooks", "_forward_pre_hooks"),
)
OWN_HOOKS = (StepContext, InputBypass, NonFiniteInputs)  # of which a replay does what they would
# Attention's processors and precision, FreeU's factors, chunked feed-forward layers;
# `PackedAttention`'s own.
ATTRIBUTES = (
    *("processor", "attention_precision", "s1", "s2", "b1", "b2"),
    *("_chunk_size", "_any_log2"),
)
PATCHES = ("forward", "_hf_hook")  # of instances, by the hooks of accelerate and diffusers


def why_not(denoiser: nn.Module) -> Refusal | None:
    """Why calls of `denoiser` cannot be recorded as it is now, or None."""
    if native.why_no_products() is not None:
        return NO_PRODUCTS
    if not is_packed(denoiser):
        return Refusal(RefusalCode.MODEL, "no packed layers")
    for module in denoiser.modules():
        if module.training:
            return Refusal(RefusalCode.TRAINING, "training mode")
        if any(name in module.__dict__ for name in PATCHES):
            return Refusal(RefusalCode.HOOK, "a hook of accelerate or diffusers")
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not isinstance(getattr(hook, "__self__", None), OWN_HOOKS):
                return Refusal(RefusalCode.HOOK, "a hook")
        if isinstance(module, IntegerLayer):
            if module.lora is not None:
                return Refusal(RefusalCode.LORA, "a LoRA")
            if module.memory != "fast":
                return Refusal(RefusalCode.MEMORY_MODE, f"the memory mode '{module.memory}'")
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return Refusal(RefusalCode.HOOK, "a global hook")
    return None


def lay_out(denoiser: nn.Module) -> None:
    """Lay the weights of all packed layers out that are not yet."""
    for module in denoiser.modules():
        if isinstance(module, IntegerLayer):
            module.prepared()


def contexts_of(denoiser: nn.Module) -> list[StepContext]:
    """The contexts that read the timestep of a call of `denoiser`."""
    owners = [getattr(hook, "__self__", None) for hook in denoiser._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, StepContext)]


class State:
    """Of a denoiser: its parts, its hooks, what its packed layers run on, and where tensors lie.

    Of other attributes of modules it sees `ATTRIBUTES` only.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        """Note all of it."""
        modules = list(denoiser.modules())
        layers = [module for module in modules if isinstance(module, IntegerLayer)]
        own = [module.__dict__ for module in modules]
        self._modules, self._layers = own, [layer.__dict__ for layer in layers]
        self._held = [each[kind] for each in own for kind in KINDS]
        self._held += [global_hooks._global_forward_hooks, global_hooks._global_forward_pre_hooks]
        self._attributes = [
            (each, name)
            for each in own
            for name in (*ATTRIBUTES, *PATCHES)
            # FreeU's factors come to blocks that did not have them.
            if name in each or name in PATCHES or "resnets" in each["_modules"]
        ]
        self._bypasses = [each["bypass"] for each in self._layers if each["bypass"] is not None]
        registered = [value for held in self._held for value in held.values()]
        self.tensors = [each for each in registered if type(each) in (Tensor, nn.Parameter)]
        at_hand = {each.untyped_storage().data_ptr() for each in self.tensors}
        self.tensors += [
            tensor
            for layer in layers
            for tensor in layer.tensors_read()
            if tensor.untyped_storage().data_ptr() not in at_hand
        ]
        self._then = self._now()
        # Kept, so that nothing else comes to have their ids.
        self._kept = [registered, [each["_prepared"] for each in self._layers]]
        self._kept += [[each.get(name) for each, name in self._attributes], self._bypasses]
        self._kept += [[bypass.slopes for bypass in self._bypasses]]

    def _now(self) -> tuple[Any, ...]:
        return (
            torch.get_num_threads(),
            [own["training"] for own in self._modules],
            list(map(id, chain.from_iterable([held.values() for held in self._held]))),
            [id(own.get(name)) for own, name in self._attributes],
            [id(own["_prepared"]) for own in self._layers],
            [id(own["bypass"]) for own in self._layers],
            [id(bypass.slopes) for bypass in self._bypasses],
            [own["backend"] for own in self._layers],
            list(map(Tensor.data_ptr, self.tensors)),
            [p is not None and p.is_outdated() for p in (e["_prepared"] for e in self._layers)],
        )

    def unchanged(self) -> bool:
        """Whether all that is still so."""
        return self._now() == self._then
