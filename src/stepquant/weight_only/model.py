"""Replacing layers of a model by weight-only ones, and checks of their loaded tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from stepquant.models.eligibility import LAYERS, modules_kept_float, shared_weights, unmatched
from stepquant.models.surgery import replace_modules
from stepquant.numerics.finite import all_finite
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

    `float_layers` of the copy lists the layers that stay float, each with the reason:

    - those in `kept`, and those of `modules_to_not_convert`;
    - those that the model's class keeps in float32;
    - if `config` names no layers itself, those that share their weight with another module, and
      instances of other classes than `nn.Linear` and `nn.Conv2d`.

    Raises:
        StepQuantError: no layer is left, or `config` names a layer that `model` does not have. The
            message calls the model `what`.
    """
    asked = modules_kept_float(model, config.modules_to_not_convert)
    for pattern in unmatched(model, config.modules_to_not_convert):
        warnings.warn(
            f"modules_to_not_convert has '{pattern}', which names no module of {what}", stacklevel=2
        )
    asked |= {name: "input or output layer of the denoiser" for name in kept}
    if config.layers is not None:
        check_names(model, config)
        names = [name for name in config.layers if name not in asked]
        float_layers = {name: asked[name] for name in config.layers if name in asked}
    else:
        shared = shared_weights(model)
        reasons = {
            name: config.why_float(module, shared) or asked.get(name)
            for name, module in model.named_modules()
            if isinstance(module, (*LAYERS, _ConvNd, nn.Embedding))
        }
        names = [name for name, reason in reasons.items() if reason is None]
        float_layers = {name: reason for name, reason in reasons.items() if reason is not None}
    if not names:
        raise StepQuantError(f"{what} has no linear or conv layer: expected some to quantize")
    found = type(config)(names, bits=config.bits, grids=config.grids)
    found.float_layers = float_layers
    return found


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
    layer: Any = model.get_submodule(name)
    dtype = layer.weight.dtype  # of the model, which the file's weight need not have
    layer.weight = nn.Parameter(weight, requires_grad=False)
    parent, _, child = name.rpartition(".")
    new = weight_only_in_place_of(layer, bits=config.bits, kinds=config.kinds)
    new.mark(dtype)
    setattr(model.get_submodule(parent), child, new)


def put_float_layers(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace the weight-only layers of `model` by float ones with the dequantized weights.

    A float layer has the dtype of the model that its weight-only layer was made for, or `dtype`.
    For inputs of that dtype it computes the same bits.
    """
    replace_modules(
        model,
        lambda _, module: float_layer(module, dtype) if isinstance(module, WeightOnly) else None,
    )


def float_layer(layer: WeightOnly, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the `nn.Linear` or `nn.Conv2d` with the dequantized weight and the bias of `layer`."""
    dtype = dtype or layer.marked_dtype()
    new: Any = copy.copy(layer)
    new.__class__ = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    # accelerate's forward would call the old layer.
    own = ("weight_shape", "_prepared", "forward", "_old_forward", "_hf_hook")
    new.__dict__ = {key: value for key, value in vars(layer).items() if key not in own}
    bias: Any = layer.bias
    new._parameters = {
        "weight": nn.Parameter(layer.float_weight(dtype)),
        "bias": None if bias is None else nn.Parameter(bias.to(dtype)),
    }
    new._buffers = {}
    return new


def check_tensor(name: str, tensor: Tensor, wanted: Tensor) -> None:
    """Check a loaded tensor against the one that it replaces.

    Scales are float32. Other floats may have another floating-point dtype than `wanted`.

    Raises:
        StepQuantError: dtype or shape differ, or a float is not finite.
    """
    exact = not wanted.is_floating_point() or name.endswith(".weight_scale")
    same = tensor.dtype == wanted.dtype if exact else tensor.is_floating_point()
    if not same or tensor.shape != wanted.shape:
        dtype = wanted.dtype if exact else "a floating-point dtype"
        raise StepQuantError(
            f"tensor '{name}' is {tensor.dtype} of shape {list(tensor.shape)}: expected "
            f"{dtype} of shape {list(wanted.shape)}; the file is damaged or belongs to "
            "another config"
        )
    check_finite(name, tensor)


def check_finite(name: str, tensor: Tensor) -> None:
    """An error where the tensor `name` holds NaN or infinity."""
    if tensor.is_floating_point() and not tensor.is_meta and not all_finite(tensor):
        raise StepQuantError(
            f"tensor '{name}' holds NaN or infinity: expected finite numbers; the file is damaged, "
            "or the model's weights are"
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
                "files, and a device with memory for it; load without offload_state_dict, or fetch "
                "the folder again"
            )
        for key in tensor_keys(config.bits):
            tensor = getattr(layer, key)
            if tensor.is_meta or tensor.dtype != TENSORS[key]:
                raise StepQuantError(
                    f"tensor '{name}.{key}' was loaded as {tensor.dtype} on {tensor.device}: "
                    f"expected {TENSORS[key]} on a device with memory; load without offload_folder "
                    "and offload_state_dict, or fetch the folder again"
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
