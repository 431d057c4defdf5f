"""Checks of the tensors in a checkpoint.

Each error names the tensor, its state and the expected one. In this module, `expected` is a model
whose packed layers have the right shapes, with or without data.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stepquant.models.input_bypass import SLOPES_NAME
from stepquant.numerics import WEIGHT_ZERO_POINT_8BIT, max_code, max_codes
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.integer_attention import PackedAttention
from stepquant.support.errors import StepQuantError

STEP_GRID_NAME = "step_grid"
OF_STEPS = (STEP_GRID_NAME, SLOPES_NAME)  # tensors of the denoiser, float32 [T]
REMEDY = "the file is damaged or belongs to another config, so fetch or write the checkpoint again"


def packed_layers(model: nn.Module) -> dict[str, IntegerLayer]:
    """Return the packed layers of `model` by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, IntegerLayer)
    }


def packed_attention(model: nn.Module) -> dict[str, PackedAttention]:
    """Return the packed attention products in `model` by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedAttention)
    }


def packed_modules(model: nn.Module) -> dict[str, IntegerLayer | PackedAttention]:
    """Return the packed layers and the packed attention products of `model` by name."""
    return {**packed_layers(model), **packed_attention(model)}


def packed_names(model: nn.Module) -> set[str]:
    """Return the names of the tensors that stepquant owns.

    These are the tensors of packed modules, the step grid, and the slopes of an input error bypass.
    """
    names = {STEP_GRID_NAME} | ({SLOPES_NAME} if hasattr(model, SLOPES_NAME) else set())
    for name, layer in packed_modules(model).items():
        names.update(f"{name}.{key}" for key in layer.state_dict())
    return names


def check_names(expected: Iterable[str], found: Iterable[str]) -> None:
    """Check that the tensor names `found` are exactly those in `expected`.

    Raises:
        StepQuantError: a name is missing or unexpected.
    """
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
    """Check dtype, shape and values of the tensor `name` against the model `expected`.

    Float tensors that stepquant does not own may have another floating-point dtype.

    Raises:
        StepQuantError: the dtype, the shape or a value is wrong.
    """
    layer_name, _, key = name.rpartition(".")
    layer = expected.get_submodule(layer_name)
    wanted = getattr(layer, key)
    packed = layer if isinstance(layer, IntegerLayer | PackedAttention) else None
    exact = packed is not None or name in OF_STEPS or not wanted.is_floating_point()
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
    if name == SLOPES_NAME and not bool(torch.isfinite(tensor).all()):
        raise StepQuantError(
            f"tensor '{name}' holds NaN or infinity: expected finite numbers; {REMEDY}"
        )


def check_model(model: nn.Module) -> None:
    """Check the packed tensors of `model` as a load would.

    Raises:
        StepQuantError: a tensor has a wrong dtype, shape or value.
    """
    for layer_name, layer in packed_modules(model).items():
        for key, tensor in layer.state_dict().items():
            check_tensor(f"{layer_name}.{key}", tensor, model)
    for name in OF_STEPS:
        tensor = getattr(model, name, None)
        if tensor is not None and tensor.dtype != torch.float32:
            raise StepQuantError(
                f"tensor '{name}' of the model has dtype {tensor.dtype}: expected torch.float32; "
                "save the model as it was loaded, without a cast"
            )
    check_channel_bits(model)


def check_channel_bits(model: nn.Module) -> None:
    """Check the bits of out-channels against the config, and zero points against the bits.

    The check covers layers whose out-channels differ in bits. They must hold their data, because it
    needs two tensors of a layer at once.

    Raises:
        StepQuantError: the bits differ from the config, or a zero point is not on its grid.
    """
    for name, layer in packed_layers(model).items():
        if layer.channel_bits is None:
            continue
        levels, channels = layer.channel_bits.cpu().unique(return_counts=True)
        found = tuple(zip(levels.tolist(), channels.tolist(), strict=True))
        if found != layer.spec.channel_counts:
            raise StepQuantError(
                f"tensor '{name}.channel_bits' holds the (bits, out-channels) {list(found)}: "
                f"expected {list(layer.spec.channel_counts or ())}, as the quantization config "
                f"says; {REMEDY}"
            )
        _check_values(
            f"{name}.weight_zero_point", "weight_zero_point", layer.weight_zero_point, layer
        )


def _why_shape(layer: IntegerLayer | PackedAttention, key: str) -> str:
    if isinstance(layer, PackedAttention):
        return f", for tables of {layer.steps} rows"
    spec = layer.spec
    if key == "weight_packed":
        codes = spec.out_channels * spec.columns
        return f" bytes, which {codes} codes of {spec.mean_weight_bits:g} bits take"
    if key.startswith("act_") and key != "act_channel_scale":
        return f", that is, input parts x rows of the step table ({layer.steps})"
    return ""


def _check_values(
    name: str, key: str, tensor: Tensor, layer: IntegerLayer | PackedAttention
) -> None:
    if key in ("weight_scale", "act_scale", "act_channel_scale", "probability_scale"):
        # The runtime multiplies by the inverse, which must be finite as well.
        good = (tensor > 0) & torch.isfinite(tensor) & torch.isfinite(1.0 / tensor)
        expected = "finite positive scales"
    elif key in ("bias", "step_bias"):
        good, expected = torch.isfinite(tensor), "finite numbers"
    elif key == "act_zero_point":
        bits = layer.bits if isinstance(layer, PackedAttention) else layer.spec.activation_bits
        good = tensor <= max_code(bits)
        expected = f"at most {max_code(bits)}, the largest code of {bits} bits"
    elif key == "probability_log2":
        good, expected = tensor <= 1, "0 for the uniform grid or 1 for the log2 grid"
    elif key == "weight_zero_point" and isinstance(layer, IntegerLayer):
        good, expected = _good_weight_zero_points(tensor, layer)
    else:
        return
    if not bool(good.all()):
        index = tuple(int(i) for i in (~good).nonzero()[0])
        raise StepQuantError(
            f"tensor '{name}' holds {tensor[index].item()} at {list(index)}: expected {expected}; "
            f"{REMEDY}"
        )


def _good_weight_zero_points(tensor: Tensor, layer: IntegerLayer) -> tuple[Tensor, str]:
    """Return which zero points `[P, C_out]` are on their grids, and the expected values as text."""
    spec, bits = layer.spec, layer.channel_bits
    uniform = spec.channel_counts is None
    known = bits is not None and not bits.is_meta
    if not known:  # one bound for all channels until the bits are read
        bits = torch.full((spec.out_channels,), spec.weight_bits)
    assert bits is not None
    bits = bits.to(tensor.device)
    unit = 2 if spec.half_zero_points else 1
    good = tensor <= unit * max_codes(bits)
    if uniform or known:
        good &= (bits != 8) | (tensor == WEIGHT_ZERO_POINT_8BIT)
    if uniform and spec.weight_bits == 8:
        return good, "128 everywhere for 8-bit weights"
    what = "twice the largest code" if spec.half_zero_points else "the largest code"
    return good, f"at most {unit * max_code(spec.weight_bits)}, {what} of {spec.weight_bits} bits"
