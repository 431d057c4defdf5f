"""Checks of what a checkpoint holds. Each error names the tensor, what it is and what it should be.

`expected` is a model whose packed layers have the right shapes, with or without data.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stepquant.errors import StepQuantError
from stepquant.numerics import WEIGHT_ZERO_POINT_8BIT, max_code
from stepquant.runtime.packed import PackedLayer

STEP_GRID_NAME = "step_grid"
REMEDY = "the file is damaged or belongs to another config, so fetch or write the checkpoint again"


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Name -> layer, for each packed layer of `model`."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)
    }


def packed_names(model: nn.Module) -> set[str]:
    """Names of the tensors that stepquant owns: each packed layer's and the step grid."""
    names = {STEP_GRID_NAME}
    for name, layer in packed_layers(model).items():
        names.update(f"{name}.{key}" for key in layer.state_dict())
    return names


def check_names(expected: Iterable[str], found: Iterable[str]) -> None:
    """Every expected tensor is there, and nothing else."""
    expected, found = set(expected), set(found)
    for names, problem in (
        (expected - found, "lacks the tensor"),
        (found - expected, "holds the unexpected tensor"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise StepQuantError(
                f"the checkpoint {problem} '{min(names)}'{more}: expected exactly the "
                f"{len(expected)} tensors of the model and its quantization config; {REMEDY}"
            )


def check_tensor(name: str, tensor: Tensor, expected: nn.Module) -> None:
    """Dtype, shape and values of the tensor called `name` in the state dict of `expected`."""
    layer_name, _, key = name.rpartition(".")
    layer = expected.get_submodule(layer_name)
    wanted = getattr(layer, key)
    packed = layer if isinstance(layer, PackedLayer) else None
    exact = packed is not None or name == STEP_GRID_NAME or not wanted.is_floating_point()
    if tensor.dtype != wanted.dtype and (exact or not tensor.is_floating_point()):
        dtype = wanted.dtype if exact else "a floating-point dtype"
        raise StepQuantError(
            f"tensor '{name}' has dtype {tensor.dtype}: expected {dtype}; {REMEDY}"
        )
    if tensor.shape != wanted.shape:
        raise StepQuantError(
            f"tensor '{name}' has shape {tuple(tensor.shape)}: expected {tuple(wanted.shape)}"
            f"{_why_shape(packed, key) if packed is not None else ''}; {REMEDY}"
        )
    if packed is not None:
        _check_values(name, key, tensor, packed)


def check_model(model: nn.Module) -> None:
    """Each tensor of each packed layer of `model`, as a load would check it."""
    for layer_name, layer in packed_layers(model).items():
        for key, tensor in layer.state_dict().items():
            check_tensor(f"{layer_name}.{key}", tensor, model)


def _why_shape(layer: PackedLayer, key: str) -> str:
    spec = layer.spec
    if key == "weight_packed":
        codes = spec.out_channels * spec.columns
        return f" bytes, which {codes} codes of {spec.weight_bits} bits take"
    if key.startswith("act_") and key != "act_channel_scale":
        return f", that is, input parts x rows of the step table ({layer.steps})"
    return ""


def _check_values(name: str, key: str, tensor: Tensor, layer: PackedLayer) -> None:
    if key in ("weight_scale", "act_scale", "act_channel_scale"):
        # The runtime multiplies with the inverse, which must be a number as well.
        good = (tensor > 0) & torch.isfinite(tensor) & torch.isfinite(1.0 / tensor)
        expected = "finite positive scales"
    elif key == "bias":
        good, expected = torch.isfinite(tensor), "finite numbers"
    elif key == "act_zero_point":
        largest = max_code(layer.spec.activation_bits)
        good = tensor <= largest
        expected = f"at most {largest}, the largest code of {layer.spec.activation_bits} bits"
    elif key == "weight_zero_point" and layer.spec.weight_bits == 8:
        good, expected = tensor == WEIGHT_ZERO_POINT_8BIT, "128 everywhere for 8-bit weights"
    elif key == "weight_zero_point":
        largest = max_code(layer.spec.weight_bits)
        good = tensor <= largest
        expected = f"at most {largest}, the largest code of {layer.spec.weight_bits} bits"
    else:
        return
    if not bool(good.all()):
        index = tuple(int(i) for i in (~good).nonzero()[0])
        raise StepQuantError(
            f"tensor '{name}' holds {tensor[index].item()} at {list(index)}: expected {expected}; "
            f"{REMEDY}"
        )
