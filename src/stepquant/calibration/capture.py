"""Inputs and outputs of one block, over a calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.trajectories import Trajectories, predict
from stepquant.errors import StepQuantError
from stepquant.models.calling import tensors_in


class _StopForward(Exception):
    """Raised by a hook once the block's input is known; the rest of the forward is not needed."""


@dataclass(frozen=True)
class Shared:
    """A tensor that a block gets for all samples together, such as a table of positions."""

    tensor: Tensor


@dataclass
class BlockData:
    """What a block is trained on.

    `args`, `kwargs`: its inputs, each tensor `[N, ...]`, in tuples and dictionaries too; tensors
    without a row for each sample are `Shared`, and anything else is as it was in the first call.
    `target`: the output to match, `[N, ...]`, as `joined_output` gives it. `timestep [N]`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    timestep: Tensor

    def __len__(self) -> int:
        return self.target.shape[0]

    def batch(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any], Tensor, Tensor]:
        """`(args, kwargs, target, timestep)` of the samples `index`."""

        def pick(value: Any) -> Any:
            if isinstance(value, Shared):
                return value.tensor
            return value[index] if isinstance(value, Tensor) else _inside(value, pick)

        args = tuple(pick(value) for value in self.args)
        kwargs = {key: pick(value) for key, value in self.kwargs.items()}
        return args, kwargs, self.target[index], self.timestep[index]


def joined_output(output: Any) -> Tensor:
    """What a block gives as one tensor: itself, or of several all values, `[N, values]`.

    Blocks of some transformers give the tokens of the text and those of the image.
    """
    if isinstance(output, Tensor):
        return output
    tensors = tensors_in(output)  # diffusers' output classes are dictionaries
    if not tensors:
        raise StepQuantError(
            f"a block gives {type(output).__name__} without a tensor: expected a tensor, or a "
            "tuple of tensors; choose other blocks"
        )
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)


def _inside(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with `change` made to what a tuple, list or dictionary holds."""
    if isinstance(value, dict):
        return {key: change(entry) for key, entry in value.items()}
    if type(value) in (tuple, list):  # not torch.Size, which is a tuple
        return type(value)(change(entry) for entry in value)
    return value


def _join(values: list[Any], counts: list[int]) -> Any:
    """One argument of calls with `counts` samples: joined if it has a row for each sample.

    The last call only tells by its number of samples what has rows, and is left out.
    """
    first = values[0]
    if isinstance(first, Tensor):
        rows = all(v.dim() > 0 and len(v) == n for v, n in zip(values, counts, strict=True))
        return torch.cat(values[:-1]) if rows else Shared(first)
    if isinstance(first, dict):
        return {key: _join([value[key] for value in values], counts) for key in first}
    if type(first) in (tuple, list):
        return type(first)(_join(list(entries), counts) for entries in zip(*values, strict=True))
    return first


@torch.no_grad()
def capture_inputs(
    model: nn.Module, block: str, data: Trajectories, batch: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `block` while `model` sees `data`, joined over batches."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    counts: list[int] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _StopForward

    with _hook(model.get_submodule(block).register_forward_pre_hook(record, with_kwargs=True)):
        starts = [slice(start, start + batch) for start in range(0, len(data), batch)]
        for rows in (*starts, slice(0, min(len(data), 2 if batch == 1 else 1))):
            part = data.take(rows)
            counts.append(len(part))
            try:
                predict(model, part)
            except _StopForward:
                continue
    args = tuple(_join([call[0][i] for call in calls], counts) for i in range(len(calls[0][0])))
    kwargs = {key: _join([call[1][key] for call in calls], counts) for key in calls[0][1]}
    return args, kwargs


@torch.no_grad()
def capture_outputs(
    model: nn.Module, blocks: list[str], data: Trajectories, batch: int
) -> dict[str, Tensor]:
    """Outputs `[N, ...]` of each of `blocks` while `model` sees `data`, in one pass."""
    outputs: dict[str, list[Tensor]] = {block: [] for block in blocks}
    handles = [
        model.get_submodule(block).register_forward_hook(
            lambda _m, _a, y, block=block: outputs[block].append(joined_output(y).clone())
        )
        for block in blocks
    ]
    try:
        for start in range(0, len(data), batch):
            predict(model, data.take(slice(start, start + batch)))
    finally:
        for handle in handles:
            handle.remove()
    return {block: torch.cat(parts) for block, parts in outputs.items()}


@torch.no_grad()
def execution_order(model: nn.Module, blocks: list[str], data: Trajectories) -> list[str]:
    """`blocks` in the order in which a forward first calls them."""
    order: list[str] = []
    handles = [
        model.get_submodule(block).register_forward_pre_hook(
            lambda _m, _a, block=block: order.append(block)
        )
        for block in blocks
    ]
    try:
        predict(model, data.take(slice(0, 1)))
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(order))


@contextmanager
def _hook(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
