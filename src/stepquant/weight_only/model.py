"""Replacing layers of a model by weight-only ones, and checks of their loaded tensors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stepquant.models.eligibility import shared_weights
from stepquant.models.surgery import replace_modules
from stepquant.quantizers.weight import GridSearch, minmax_weight_range
from stepquant.runtime.layers.weight_only import WeightOnly, weight_only_in_place_of
from stepquant.support.errors import StepQuantError
from stepquant.weight_only.config import WeightOnlyConfig

Config = TypeVar("Config", bound=WeightOnlyConfig)
TENSORS = {
    "weight": torch.int8,
    "weight_scale": torch.float32,
    "weight_zero_point": torch.uint8,  # only with less than 8 bits
}
MINMAX = "minmax"  # value of `grids` in configs: the grid covers the smallest and largest weight


def resolved(config: Config, model: nn.Module, what: str, kept: Collection[str] = ()) -> Config:
    """Return a copy of `config` that names the layers of the float `model` to quantize.

    If `config` names no layers, these are all linear and conv layers except those in `kept`, those
    that share their weight with another module, and instances of subclasses.

    Raises:
        StepQuantError: no layer is left, or `config` names a layer that `model` does not have. The
            message calls the model `what`.
    """
    if config.layers is not None:
        check_names(model, config)
        return _with_layers(config, config.layers)
    shared = shared_weights(model)
    names = [
        name
        for name, module in model.named_modules()
        if config.takes(module, shared) and name not in kept
    ]
    if not names:
        raise StepQuantError(f"{what} has no linear or conv layer: expected some to quantize")
    return _with_layers(config, names)


def resolved_at_load(config: Config, model: nn.Module) -> Config:
    """Return the resolved config of a float model that is quantized while it is loaded.

    `config` itself stays unchanged.

    Raises:
        StepQuantError: as in `resolved`, or `grids` asks for a search, which loading does not do.
    """
    if config.grids not in (None, MINMAX):
        raise StepQuantError(
            f"grids of a {type(config).__name__} for a float model is {config.grids!r}: expected "
            f"'{MINMAX}', the only search at load; run stepquant quantize --recipe weight-only for "
            "another"
        )
    found = resolved(config, model, type(model).__name__)
    found.grids = MINMAX if config.bits < 8 else None
    return found


def _with_layers(config: Config, layers: list[str]) -> Config:
    return type(config)(layers, bits=config.bits, grids=config.grids)


def check_names(model: nn.Module, config: WeightOnlyConfig) -> None:
    """Check that each name in `config` is that of a layer that can be quantized.

    Raises:
        StepQuantError: `model`, a float model, has no such layer, or it has to stay float.
    """
    modules = dict(model.named_modules())
    for name in config.names:
        if name not in modules or not config.takes(modules[name]):
            found = type(modules[name]).__name__ if name in modules else "nothing"
            raise StepQuantError(
                f"the config of a weight-only component names the layer '{name}', which is {found} "
                f"in {type(model).__name__}: expected its linear and conv layers; the config "
                "belongs to another model"
            )


def tensor_keys(bits: int) -> tuple[str, ...]:
    """Return the names of a weight-only layer's tensors other than its bias."""
    return tuple(TENSORS)[: 3 if bits < 8 else 2]


def put_layers(
    model: nn.Module,
    config: WeightOnlyConfig,
    empty: bool = False,
    find: GridSearch = minmax_weight_range,
) -> set[str]:
    """Replace the layers that `config` names by weight-only ones, in place.

    Args:
        model: the float model.
        config: names of layers, and bits.
        empty: make the new layers on the meta device, for tensors from a file. By default they hold
            the rounded weights.
        find: search for the grids of weights with less than 8 bits.

    Returns:
        Names of the new layers' codes, scales and zero points in the state dict.

    Raises:
        StepQuantError: see `check_names`.
    """
    check_names(model, config)
    chosen = set(config.names)
    replace_modules(
        model,
        lambda name, module: (
            weight_only_in_place_of(module, empty, config.bits, find, config.kinds)
            if name in chosen
            else None
        ),
    )
    return {f"{name}.{key}" for name in chosen for key in tensor_keys(config.bits)}


def put_layer(model: nn.Module, name: str, weight: Tensor, config: WeightOnlyConfig) -> None:
    """Replace the float layer `name` by a weight-only one with the float `weight [C_out, ...]`.

    Grids of less than 8 bits cover the smallest and largest weight. The bias is kept, and may be
    loaded later.
    """
    layer = model.get_submodule(name)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    parent, _, child = name.rpartition(".")
    new = weight_only_in_place_of(layer, bits=config.bits, kinds=config.kinds)
    setattr(model.get_submodule(parent), child, new)


def check_tensor(name: str, tensor: Tensor, wanted: Tensor) -> None:
    """Check a loaded tensor against the one that it replaces.

    Raises:
        StepQuantError: dtype or shape differ.
    """
    if tensor.dtype != wanted.dtype or tensor.shape != wanted.shape:
        raise StepQuantError(
            f"tensor '{name}' is {tensor.dtype} of shape {list(tensor.shape)}: expected "
            f"{wanted.dtype} of shape {list(wanted.shape)}; the file is damaged or belongs to "
            "another config"
        )


def check_loaded(model: nn.Module, config: WeightOnlyConfig) -> None:
    """Check that all layers named in `config` have valid codes, scales and zero points.

    Raises:
        StepQuantError: a tensor is missing or of another dtype, a scale is not positive and finite,
            or a zero point exceeds 15.
    """
    for name in config.names:
        layer: Any = model.get_submodule(name)
        if not isinstance(layer, WeightOnly):
            raise StepQuantError(
                f"the layer '{name}' got no weight: expected the tensor '{name}.weight' in the "
                "files, and a device with memory for it; the folder is incomplete"
            )
        for key in tensor_keys(config.bits):
            tensor = getattr(layer, key)
            if tensor.is_meta or tensor.dtype != TENSORS[key]:
                raise StepQuantError(
                    f"tensor '{name}.{key}' was loaded as {tensor.dtype} on {tensor.device}: "
                    f"expected {TENSORS[key]} on a device with memory; the file is incomplete"
                )
        scale = layer.weight_scale
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            raise StepQuantError(
                f"tensor '{name}.weight_scale' holds values that are not scales: expected finite "
                "positive numbers; the file is damaged"
            )
        zero_point = layer.weight_zero_point
        if zero_point is not None and bool((zero_point > 15).any()):
            raise StepQuantError(
                f"tensor '{name}.weight_zero_point' holds {int(zero_point.max())}: expected at "
                "most 15, the largest code of 4 bits; the file is damaged"
            )
