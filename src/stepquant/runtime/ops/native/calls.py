"""Calls the native kernels with tensors; `runtime.ops.fused` says what they compute.

Arguments are as there, on the CPU and not empty; images and rows are float32 or bfloat16. A forward
pass makes hundreds of these calls, so they add little overhead: they pack structures
(`native.structures`) as bytes and pass tensors by address.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from stepquant.models.non_finite import report_found
from stepquant.runtime.ops.encoding import activated
from stepquant.runtime.ops.grids import Grid, Output
from stepquant.runtime.ops.native import Library, structures
from stepquant.runtime.ops.native.structures import ACTIVATIONS, STATUS
from stepquant.support.errors import StepQuantError

NOT_FINITE = STATUS["not_finite"]
_pack_shape, _pack_image = structures.SHAPE.pack, structures.IMAGE.pack
_pack_output, _pack_rows = structures.OUTPUT.pack, structures.ROWS.pack
_pack_grid = structures.GRID.pack


def group_norm_encode(
    library: Library,
    parts: Sequence[Tensor],
    added: Tensor | None,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    outputs: Sequence[Output],
) -> list[Tensor]:
    """See `fused.group_norm_encode`."""
    batch, _, height, width = parts[0].shape
    parts = [
        part if part.stride(1) == 1 else part.contiguous(memory_format=torch.channels_last)
        for part in parts
    ]
    channels = sum([part.shape[1] for part in parts])
    added, weight, bias = floats(added), floats(weight), floats(bias)
    results = [_empty(batch, out.channels, height, width, out.padding) for out in outputs]
    status = library.group_norm_encode(
        _pack_shape(batch, channels, height, width),
        b"".join([_image(part) for part in parts]),
        len(parts),
        _address(added),
        groups,
        _address(weight),
        _address(bias),
        eps,
        ACTIVATIONS[activation],
        b"".join([_output(out, result) for out, result in zip(outputs, results, strict=True)]),
        len(results),
        torch.get_num_threads(),
    )
    if status:
        check(status, *parts, added)
    return results


def encode(
    library: Library, x: Tensor, activation: str, grid: Grid, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """See `fused.encode`."""
    kind, threads = ACTIVATIONS[activation], torch.get_num_threads()
    if x.dim() == 4:
        batch, channels, height, width = x.shape
        strides = x.stride()
        if strides[1] != 1 and strides[3] != 1:
            x = x.contiguous(memory_format=torch.channels_last)
        result = _empty(batch, channels, height, width, padding)
        status = library.encode_image(
            _pack_shape(batch, channels, height, width),
            _image(x),
            kind,
            _output(Output(0, channels, grid, padding), result),
            threads,
        )
    else:
        x = x.contiguous()
        result = _empty_rows(x.shape)
        status = library.encode_flat(
            x.data_ptr(),
            x.dtype is torch.bfloat16,
            x.numel(),
            x.shape[-1] if x.dim() else 1,
            kind,
            grid_structure(grid),
            result.data_ptr(),
            threads,
        )
    if status:
        check(status, x)
    return result


def layer_norm_encode(
    library: Library,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    grids: Sequence[Grid],
) -> list[Tensor]:
    """See `fused.layer_norm_encode`."""
    x = x.contiguous()
    batch, channels = (x.shape[0] if x.dim() > 1 else 1), x.shape[-1]
    weight, bias, scale, shift = floats(weight), floats(bias), _rows(scale), _rows(shift)
    results = [_empty_rows(x.shape) for _ in grids]
    status = library.layer_norm_encode(
        _pack_rows(
            *(x.data_ptr(), x.dtype is torch.bfloat16),
            *(batch, x.numel() // (batch * channels), channels),
        ),
        _address(weight),
        _address(bias),
        eps,
        _address(scale),
        0 if scale is None else scale.stride(0),
        _address(shift),
        0 if shift is None else shift.stride(0),
        b"".join([grid_structure(grid) for grid in grids]),
        struct.pack(f"{len(results)}q", *[result.data_ptr() for result in results]),
        len(results),
        torch.get_num_threads(),
    )
    if status:
        check(status, x, scale, shift)
    return results


def gated_encode(library: Library, x: Tensor, gate_activation: str, grid: Grid) -> Tensor:
    """See `fused.gated_encode`."""
    x = x.contiguous()
    channels = x.shape[-1] // 2
    result = _empty_rows((*x.shape[:-1], channels))
    status = library.gated_encode(
        _pack_rows(
            x.data_ptr(), x.dtype is torch.bfloat16, 1, result.numel() // channels, channels
        ),
        ACTIVATIONS[gate_activation],
        grid_structure(grid),
        result.data_ptr(),
        torch.get_num_threads(),
    )
    if status:  # of finite halves, the product may be infinite
        values, gates = x.to(torch.float32).chunk(2, dim=-1)
        check(status, x, values * activated(gates, gate_activation))
    return result


def epilogue(
    library: Library,
    grid: Grid,
    sums: Tensor,
    bias: Tensor | None,
    step_bias: Tensor | None,
    add_share: bool,
) -> tuple[Tensor, Tensor]:
    """See `fused.epilogue`."""
    channels = sums.shape[0]
    sums_, bias, step_bias = floats(sums), floats(bias), floats(step_bias)
    result = torch.empty(channels + 1, dtype=torch.float32, device="cpu")
    status = library.epilogue(
        grid_structure(grid),
        _address(sums_) if add_share else None,
        _address(bias),
        _address(step_bias),
        channels,
        result.data_ptr(),
    )
    if status:
        fail(status)
    found, scale = torch.split_with_sizes(result, (channels, 1))
    return scale, found


# Explicit dtype and device: the kernels cannot write to tensors of a default that the user has set.
def _empty(batch: int, channels: int, height: int, width: int, padding: tuple[int, int]) -> Tensor:
    shape = (batch, channels, height + 2 * padding[0], width + 2 * padding[1])
    return torch.empty(shape, dtype=torch.uint8, device="cpu", memory_format=torch.channels_last)


def _empty_rows(shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8, device="cpu")


def floats(x: Tensor | None) -> Tensor | None:
    """`x` as the kernels read it: float32 and contiguous."""
    if x is None or (x.dtype is torch.float32 and x.is_contiguous()):
        return x
    return x.to(torch.float32).contiguous()


def _rows(x: Tensor | None) -> Tensor | None:
    """As `floats`, but with any row stride, because rows are often chunks of one tensor."""
    return x if x is not None and x.dtype is torch.float32 and x.stride(1) == 1 else floats(x)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _image(x: Tensor) -> bytes:
    return _pack_image(x.data_ptr(), x.dtype is torch.bfloat16, x.shape[1], *x.stride())


def grid_addresses(grid: Grid) -> tuple[int, ...]:
    """The current addresses of a grid's tensors; 0 for None."""
    scale, zero_point, row, _, factors, _ = grid
    return (
        *(scale.data_ptr(), zero_point.data_ptr()),
        *(0 if row is None else row.data_ptr(), 0 if factors is None else factors.data_ptr()),
    )


def grid_structure(grid: Grid) -> bytes:
    """The C struct of a grid, as bytes.

    Raises StepQuantError for tensors that the kernels would misread.
    """
    if grid.structure is not None:
        return grid.structure
    scale, zero_point, row, largest, factors, _ = grid
    if not (
        (_are_floats(scale) and zero_point.dtype is torch.uint8 and zero_point.is_contiguous())
        and (row is None or (row.dtype is torch.int64 and row.is_cpu))
        and scale.numel() == zero_point.numel()
        and (factors is None or _are_floats(factors))
    ):
        raise StepQuantError(
            f"the native kernels cannot read the grid {grid}: expected contiguous float32 scales "
            "and factors, one uint8 zero point for each scale, and an int64 row, all on the CPU"
        )
    *tables, of_channels = grid_addresses(grid)
    return _pack_grid(*tables, scale.numel(), largest, of_channels)


def _are_floats(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.is_contiguous() and x.is_cpu


def _output(out: Output, result: Tensor) -> bytes:
    grid = grid_structure(out.grid)
    return _pack_output(result.data_ptr(), out.start, out.channels, *out.padding, grid)


def check(status: int, *inputs: Tensor | None) -> None:
    """Report what is not finite among `inputs`, the floats of a call; raise as `fail` does.

    Raises NonFiniteError where nobody collects the report.
    """
    if status != NOT_FINITE:
        fail(status)
    for x in inputs:
        if x is not None:
            report_found(x)


def fail(status: int) -> None:
    """Raise the error that a native function's status other than 0 stands for.

    Raises StepQuantError for a row outside the step table, and MemoryError if an allocation failed.
    """
    if status == STATUS["row_outside"]:
        raise StepQuantError(
            "a grid's row is outside its step table: expected the row of a calibrated step"
        )
    assert status == STATUS["no_memory"], status
    raise MemoryError(
        "a native kernel could not allocate its buffers: free some memory or lower the batch size"
    )
