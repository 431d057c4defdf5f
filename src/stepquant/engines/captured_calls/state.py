"""The state that a recorded call depends on; a recording is valid while this state is unchanged."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from stepquant.models.input_bypass import InputBypass
from stepquant.models.non_finite import NonFiniteSamples
from stepquant.quantizers.step_grid import StepContext
from stepquant.runtime.layers.adapters import adapted_layer
from stepquant.runtime.layers.integer import IntegerLayer, is_packed
from stepquant.runtime.ops import native
from stepquant.support.refusal import Refusal, RefusalCode

NO_PRODUCTS = Refusal(RefusalCode.NO_PRODUCTS, "no native integer products on this machine")
OWN_HOOKS = (StepContext, InputBypass, NonFiniteSamples)  # replays reproduce their effects
# Dictionaries that every module has and that `forward` does not read.
NOT_OF_CALLS = {name for name, value in nn.Module().__dict__.items() if isinstance(value, dict)} - {
    *("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"),
}
APART = (Tensor, nn.Module, type, *OWN_HOOKS)
PATCHES = ("forward", "_hf_hook")  # set on instances by the hooks of accelerate and diffusers


def why_not(denoiser: nn.Module) -> Refusal | None:
    """Why calls of `denoiser` cannot be recorded in its current state, or None."""
    if native.why_no_products() is not None:
        return NO_PRODUCTS
    if not is_packed(denoiser):
        return Refusal(RefusalCode.MODEL, "no packed layers")
    for module in denoiser.modules():
        if adapted_layer(module) is not None:
            return Refusal(RefusalCode.LORA, "a LoRA")
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
    """Lay out the weights of all packed layers that are not laid out yet."""
    for module in denoiser.modules():
        if isinstance(module, IntegerLayer):
            module.prepared()


def contexts_of(denoiser: nn.Module) -> list[StepContext]:
    """The step contexts that read the timestep when `denoiser` is called."""
    owners = [getattr(hook, "__self__", None) for hook in denoiser._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, StepContext)]


def watched(modules: list[nn.Module]) -> list[dict[Any, Any]]:
    """The dictionaries that hold the attributes of `modules`, and those one level down.

    They cover

    - each module's own attributes, with its parameters, buffers, hooks and submodules;
    - the entries of its dictionaries;
    - the attributes of its other objects, such as an attention processor or a config.

    The attributes of step context and input bypass are left out, because they change in every call.
    """
    found: dict[int, dict[Any, Any]] = {}
    for module in modules:
        own = module.__dict__
        found[id(own)] = own
        for name, value in own.items():
            if name in NOT_OF_CALLS:
                continue
            within = value if isinstance(value, dict) else getattr(value, "__dict__", None)
            if isinstance(within, dict) and not isinstance(value, APART):
                found[id(within)] = within
    return list(found.values())


class State:
    """A snapshot of a denoiser: attributes (`watched`), layouts, tensor addresses and threads.

    Attributes are compared by identity, so every assignment is detected. In-place changes of a
    list, or of an object two levels down, are not.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        """Take the snapshot of `denoiser`."""
        modules = list(denoiser.modules())
        layers = [module for module in modules if isinstance(module, IntegerLayer)]
        self._layers = [layer.__dict__ for layer in layers]
        self._bypasses = [each["bypass"] for each in self._layers if each["bypass"] is not None]
        self._watched = [
            *watched(modules),
            *(global_hooks._global_forward_hooks, global_hooks._global_forward_pre_hooks),
        ]
        values = list(chain.from_iterable(map(dict.values, self._watched)))
        self.tensors = [each for each in values if type(each) in (Tensor, nn.Parameter)]
        at_hand = {each.untyped_storage().data_ptr() for each in self.tensors}
        self.tensors += [
            tensor
            for layer in layers
            for tensor in layer.tensors_read()
            if tensor.untyped_storage().data_ptr() not in at_hand
        ]
        self._then = self._now()
        # References, so that no new object can get one of the recorded ids.
        self._kept = [*values, *(bypass.slopes for bypass in self._bypasses)]

    def _now(self) -> tuple[Any, ...]:
        return (
            torch.get_num_threads(),
            list(map(id, chain.from_iterable(map(dict.values, self._watched)))),
            [id(bypass.slopes) for bypass in self._bypasses],
            list(map(Tensor.data_ptr, self.tensors)),
            [p is not None and p.is_outdated() for p in (e["_prepared"] for e in self._layers)],
        )

    def unchanged(self) -> bool:
        """Whether the denoiser still matches the snapshot."""
        return self._now() == self._then
