"""Inputs and outputs of one block, over a calibration set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.replay import readers, replaying
from stepquant.calibration.trajectories import Trajectories


class _StopForward(Exception):
    """Raised by a hook once the block's input is known; the rest of the forward is not needed."""


@dataclass
class BlockData:
    """What a block is trained on.

    `args`, `kwargs`: its inputs, each tensor `[N, ...]`, anything else as it was in the first
    call. `target`: the output to match, `[N, ...]`. `timestep [N]`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    timestep: Tensor

    def __len__(self) -> int:
        return self.target.shape[0]

    def batch(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any], Tensor, Tensor]:
        """`(args, kwargs, target, timestep)` of the samples `index`."""
        args, kwargs = pick(self.args, self.kwargs, index)
        return args, kwargs, self.target[index], self.timestep[index]


def pick(
    args: tuple[Any, ...], kwargs: dict[str, Any], index: Tensor | slice
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's inputs for the samples `index`."""

    def one(value: Any) -> Any:
        return value[index] if isinstance(value, Tensor) else value

    return tuple(one(value) for value in args), {key: one(value) for key, value in kwargs.items()}


def _join(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else values[0]


@torch.no_grad()
def capture_inputs(
    model: nn.Module,
    block: str,
    data: Trajectories,
    batch: int,
    outputs: Mapping[str, Tensor] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `block` while `model` sees `data`, joined over batches.

    `outputs`: what blocks before it give for `data`, `[N, ...]`, which then do not run again.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _StopForward

    with (
        _hook(model.get_submodule(block).register_forward_pre_hook(record, with_kwargs=True)),
        replaying(model, outputs or {}) as stands_in,
    ):
        for start in range(0, len(data), batch):
            part = slice(start, start + batch)
            for stand_in in stands_in:
                stand_in.part = part
            try:
                model(data.sample[part], data.timestep[part])
            except _StopForward:
                continue
    args = tuple(_join([call[0][i] for call in calls]) for i in range(len(calls[0][0])))
    kwargs = {key: _join([call[1][key] for call in calls]) for key in calls[0][1]}
    return args, kwargs


@torch.no_grad()
def capture_outputs(
    model: nn.Module, blocks: list[str], data: Trajectories, batch: int
) -> dict[str, Tensor]:
    """Outputs `[N, ...]` of each of `blocks` while `model` sees `data`, in one pass."""
    outputs: dict[str, list[Tensor]] = {block: [] for block in blocks}
    handles = [
        model.get_submodule(block).register_forward_hook(
            lambda _m, _a, y, block=block: outputs[block].append(y.clone())
        )
        for block in blocks
    ]
    try:
        for start in range(0, len(data), batch):
            model(data.sample[start : start + batch], data.timestep[start : start + batch])
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
        model(data.sample[:1], data.timestep[:1])
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(order))


def last_readers(model: nn.Module, order: list[str], data: Trajectories) -> dict[str, int]:
    """The position in `order` of the last of these blocks that reads each one's output, or -1.

    Only for blocks whose output can be replayed: one tensor, from one call in a forward.
    """
    calls: dict[str, list[Any]] = {name: [] for name in order}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, y, name=name: calls[name].append(y)
        )
        for name in order
    ]
    call = (data.sample[:1], data.timestep[:1])
    with torch.no_grad():
        try:
            model(*call)
        finally:
            for handle in handles:
                handle.remove()
    single = {name: found[0] for name, found in calls.items() if len(found) == 1}
    outputs = {name: y for name, y in single.items() if isinstance(y, Tensor)}
    return {
        name: max((order.index(reader) for reader in found), default=-1)
        for name, found in readers(model, order, outputs, *call).items()
    }


@contextmanager
def _hook(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
