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
OWN_HOOKS = (StepContext, InputBypass, NonFiniteInputs)  # of which a replay does what they would
# Dictionaries that every module has, and that its forward does not read.
NOT_OF_CALLS = {name for name, value in nn.Module().__dict__.items() if isinstance(value, dict)} - {
    *("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"),
}
APART = (Tensor, nn.Module, type, *OWN_HOOKS)
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


def watched(modules: list[nn.Module]) -> list[dict[Any, Any]]:
    """All dictionaries that hold attributes of `modules`, and of what their attributes hold.

    Attributes are those of a module (parameters, buffers, hooks and parts are among them), the
    entries of its dictionaries, and the attributes of its other objects, such as an attention
    processor or a config. The step context and the input bypass, which change with every call, are
    not.
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
    """What a denoiser is and runs on: its attributes (`watched`), kernels, and where tensors lie.

    Attributes are compared by identity, so that any assignment is seen. A list or an object two
    levels down that is changed in place is not.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        """Note all of it."""
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
        # So that nothing else comes to have their ids.
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
        """Whether all that is still so."""
        return self._now() == self._then
