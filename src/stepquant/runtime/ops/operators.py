"""The fused passes as `torch.library` operators, in the namespace `stepquant`.

Operators accept only schema types. So a `Grid` is passed as its fields, a list of grids as one
list per field, and a layer's weight and spec as their fields. `implement` reverses this: an
implementation takes the arguments of its namesake in `ops.plain`, which `native.checks` has
checked. This module registers three implementations of each operator:

- `ops.cpu` for the CPU;
- `ops.plain`, torch operations, for all other devices;
- `ops.fakes`, which returns shapes.

A device with kernels of its own adds one line for each:

    implement("encode", "CUDA", kernels.encode)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepquant.runtime.ops import cpu, fakes, plain
from stepquant.runtime.ops.encoding import pad
from stepquant.runtime.ops.grids import Grid, Output
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import checks
from stepquant.runtime.ops.native.tiled_weight import Weight, weight_of

FIELDS = 5  # fields of a Grid in a schema: all but the structure

_GRID = "Tensor scale, Tensor zero_point, Tensor? row, int largest, Tensor? factors"
_OUTPUT_GRID = ", ".join(part.replace(" ", " output_") for part in _GRID.split(", "))
_GRIDS = "Tensor[] scales, Tensor[] zero_points, Tensor?[] rows, int[] largest, Tensor?[] factors"
_PRODUCT = (
    f"Tensor codes, {_GRID}, Tensor tiles, Tensor weight_scale, Tensor sums, Tensor? bias,"
    " Tensor? step_bias, bool linear, int in_channels, int[2] kernel_size, int[2] stride,"
    " int[2] padding, int[2] dilation"
)


def grid_values(grid: Grid) -> tuple[Any, ...]:
    """The fields of a grid, as arguments of an operator."""
    return grid[:FIELDS]


def grid_lists(grids: Sequence[Grid]) -> tuple[list[Any], ...]:
    """The fields of several grids as arguments of an operator: one list for each field."""
    return tuple([[grid[field] for grid in grids] for field in range(FIELDS)])


def product_values(weight: Weight, spec: LayerSpec, padding: tuple[int, int]) -> tuple[Any, ...]:
    """A layer's weight and shape, as arguments of an operator.

    `padding`: rows and columns that the operator still has to add to the codes.
    """
    return (
        *(weight.tiles, weight.scale, weight.sums, weight.bias, weight.step_bias),
        *(spec.kind == "linear", spec.in_channels),
        *(spec.kernel_size, spec.stride, padding, spec.dilation),
    )


class _Operator(NamedTuple):
    schema: str
    gather: Callable[..., tuple[Any, ...]]
    """Maps the operator's arguments to those of its implementations."""


def _gather_group_norm(*values: Any) -> tuple[Any, ...]:
    *before, scales, zero_points, rows, largest, factors, starts, channels, paddings = values
    grids = _grids(scales, zero_points, rows, largest, factors)
    pairs = zip(paddings[::2], paddings[1::2], strict=True)
    outputs = map(Output, starts, channels, grids, pairs)
    return (*before, list(outputs))


def _gather_encode(x: Tensor, activation: str, *values: Any) -> tuple[Any, ...]:
    *grid, padding = values
    return x, activation, Grid(*grid), tuple(padding)


def _gather_layer_norm(*values: Any) -> tuple[Any, ...]:
    return (*values[:-FIELDS], _grids(*values[-FIELDS:]))


def _gather_last_grid(*values: Any) -> tuple[Any, ...]:
    return (*values[:-FIELDS], Grid(*values[-FIELDS:]))


def _gather_epilogue(*values: Any) -> tuple[Any, ...]:
    return (Grid(*values[:FIELDS]), *values[FIELDS:])


def _gather_product(*values: Any) -> tuple[Any, ...]:
    codes, grid, tensors = values[0], Grid(*values[1:6]), values[6:11]
    linear, in_channels, *sizes = values[11:17]
    tiles, scale, sums, bias, step_bias = tensors
    scale = scale.to(torch.float32).contiguous()
    weight = weight_of(tiles.contiguous(), scale, sums.contiguous(), bias, step_bias)
    kernel_size, stride, padding, dilation = (tuple(each) for each in sizes)
    shape = ("linear" if linear else "conv2d", in_channels, scale.shape[0])
    spec = LayerSpec(*shape, 8, 8, kernel_size, stride, (0, 0), dilation)
    if any(padding):
        codes = pad(codes, grid.in_force()[1], padding)
    return (codes, grid, weight, spec, *values[17:])


def _gather_product_codes(*values: Any) -> tuple[Any, ...]:
    return (*_gather_product(*values[:-FIELDS]), Grid(*values[-FIELDS:]))


def _grids(*lists: Sequence[Any]) -> list[Grid]:
    return [Grid(*fields) for fields in zip(*lists, strict=True)]


OPERATORS = {
    "group_norm_encode": _Operator(
        "(Tensor[] parts, Tensor? added, int groups, Tensor? weight, Tensor? bias, float eps,"
        f" str activation, {_GRIDS}, int[] starts, int[] channels, int[] paddings) -> Tensor[]",
        _gather_group_norm,
    ),
    "encode": _Operator(
        f"(Tensor x, str activation, {_GRID}, int[2] padding) -> Tensor", _gather_encode
    ),
    "layer_norm_encode": _Operator(
        "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift,"
        f" {_GRIDS}) -> Tensor[]",
        _gather_layer_norm,
    ),
    "gated_encode": _Operator(
        f"(Tensor x, str gate_activation, {_GRID}) -> Tensor", _gather_last_grid
    ),
    "epilogue": _Operator(
        f"({_GRID}, Tensor sums, Tensor? bias, Tensor? step_bias, bool add_share)"
        " -> (Tensor, Tensor)",
        _gather_epilogue,
    ),
    "tiled_product": _Operator(
        f"({_PRODUCT}, Tensor? added, ScalarType dtype, Tensor? gate) -> Tensor", _gather_product
    ),
    "tiled_product_codes": _Operator(
        f"({_PRODUCT}, str activation, bool gated, {_OUTPUT_GRID}) -> Tensor",
        _gather_product_codes,
    ),
    "attention_codes": _Operator(
        f"(Tensor query, Tensor key, Tensor value, int heads, {_GRID}) -> Tensor",
        _gather_last_grid,
    ),
}

_LIBRARY = torch.library.Library("stepquant", "FRAGMENT")


def implement(name: str, key: str, function: Callable[..., Any]) -> None:
    """Register `function` as the operator `name` for the dispatch key `key`, such as "CUDA".

    `function` takes the arguments of its namesake in `ops.plain`, already checked. It must return
    new tensors that share no memory with each other.
    """
    _LIBRARY.impl(name, _gathering(name, function), key)


def _gathering(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    gather, check = OPERATORS[name].gather, getattr(checks, name)

    def run(*values: Any) -> Any:
        arguments = gather(*values)
        check(*arguments)
        return function(*arguments)

    return run


def _apart(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """`function` with its results cloned, so that they share no memory."""
    return lambda *arguments: tuple([each.clone() for each in function(*arguments)])


for _name, _operator in OPERATORS.items():
    _own, _any = getattr(cpu, _name), getattr(plain, _name)
    if _name == "epilogue":
        _own, _any = _apart(_own), _apart(_any)
    _LIBRARY.define(_name + _operator.schema)
    implement(_name, "CPU", _own)
    implement(_name, "CompositeExplicitAutograd", _any)
    torch.library.register_fake(
        f"stepquant::{_name}", _gathering(_name, getattr(fakes, _name)), lib=_LIBRARY
    )
