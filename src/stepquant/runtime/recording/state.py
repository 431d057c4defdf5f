"""What a recorded call takes for granted: it is true as long as that stays as it was."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from stepquant.models.input_bypass import InputBypass
from stepquant.quantizers.step_grid import StepContext
from stepquant.runtime import native
from stepquant.runtime.packed import PackedLayer

NO_PRODUCTS = "no native integer products on this machine"
OWN_HOOKS = (StepContext, InputBypass)  # of which a replay does what they would


def why_not(denoiser: nn.Module) -> str | None:
    """Why calls of `denoiser` cannot be recorded as it is now, or None."""
    if native.why_no_products() is not None:
        return NO_PRODUCTS
    for module in denoiser.modules():
        if module.training:
            return "training mode"
        if "forward" in module.__dict__ or hasattr(module, "_hf_hook"):
            return "a hook of accelerate"
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not isinstance(getattr(hook, "__self__", None), OWN_HOOKS):
                return "a hook"
        if isinstance(module, PackedLayer):
            if module.lora is not None:
                return "a LoRA"
            if module.memory != "fast":
                return f"the memory mode '{module.memory}'"
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return "a global hook"
    return None


class State:
    """Of a denoiser, after a call: its parts, its hooks, and where its tensors lie.

    Not seen are plain attributes of modules that are not the packed layers' own.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        """Note all of it; each later comparison takes some 0.1 ms."""
        modules = list(denoiser.modules())
        layers = [module for module in modules if isinstance(module, PackedLayer)]
        self._modules = [module.__dict__ for module in modules]
        self._layers = [layer.__dict__ for layer in layers]
        kinds = ("_modules", "_parameters", "_buffers")
        self._held: list[dict[str, Any]] = [own[kind] for own in self._modules for kind in kinds]
        self._hooks: list[Mapping[int, Any]] = [
            global_hooks._global_forward_hooks,
            global_hooks._global_forward_pre_hooks,
            *(
                own[kind]
                for own in self._modules
                for kind in ("_forward_hooks", "_forward_pre_hooks")
            ),
        ]
        # Kept, so that nothing else comes to have their ids.
        self._kept = [value for held in self._held for value in held.values()]
        self._kept += [own["_prepared"] for own in self._layers]
        read = [value for value in self._kept if type(value) in (Tensor, nn.Parameter)]
        read += [tensor for layer in layers for tensor in _laid_out(layer)]
        # Views move along with what they are views of.
        self._tensors = list(
            {each.untyped_storage().data_ptr(): each for each in reversed(read)}.values()
        )
        self._then = self._now()

    def _now(self) -> tuple[Any, ...]:
        return (
            torch.get_num_threads(),
            sum(map(len, self._hooks)),
            [own["training"] for own in self._modules],
            list(map(id, chain.from_iterable([held.values() for held in self._held]))),
            [id(own["_prepared"]) for own in self._layers],
            [own["backend"] for own in self._layers],
            list(map(Tensor.data_ptr, self._tensors)),
        )

    def unchanged(self) -> bool:
        """Whether all that is still so."""
        return self._now() == self._then


def _laid_out(layer: PackedLayer) -> list[Tensor]:
    """What the kernels of a layer read besides its buffers."""
    found: list[Tensor | None] = []
    for part in layer.prepared_parts():
        found += [part.weight, *part.rest, part.grid.factors]
        found += [] if part.held is None else part.held[:5]
    return [each for each in found if each is not None and each.layout == torch.strided]
