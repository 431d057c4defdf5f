"""Inputs and outputs of one block, over a calibration set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.block_replay import replaying
from stepquant.calibration.nested import Joined, pick
from stepquant.calibration.spill import Rows, Spill
from stepquant.calibration.trajectories import Trajectories, predict
from stepquant.models.calling import tensors_in
from stepquant.models.hooks import hooked
from stepquant.support.errors import StepQuantError


class _StopForward(Exception):
    """Raised by a hook once the block's input is known; the rest of the forward is not needed."""


@dataclass
class BlockData:
    """What a block is trained on.

    `args`, `kwargs`: its inputs, each tensor `[N, ...]`, in tuples and dictionaries too; tensors
    without a row for each sample are `Shared`, and anything else is as it was in the first call.
    `target`: the output to match, `[N, ...]`, as `joined_output` gives it. `timestep [N]`. `spill`:
    what made the tensors.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    timestep: Tensor
    spill: Spill = field(default_factory=Spill)

    def __len__(self) -> int:
        return self.target.shape[0]

    def batch(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any], Tensor, Tensor]:
        """`(args, kwargs, target, timestep)` of the samples `index`."""
        args, kwargs = pick((self.args, self.kwargs), index)
        target = self.target[index]
        self.spill.release()
        return args, kwargs, target, self.timestep[index]


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


@torch.no_grad()
def capture_inputs(
    model: nn.Module,
    block: str,
    data: Trajectories,
    batch: int,
    outputs: Mapping[str, Any] | None = None,
    spill: Spill | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `block` while `model` sees `data`, joined over batches.

    `outputs`: what blocks before it give for `data`, `[N, ...]`, which then do not run again.
    `spill` makes the joined tensors, and made `outputs`.
    """
    spill = spill or Spill()
    joined = Joined(f"the block '{block}'", len(data), spill)
    count = 0

    def record(_: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        joined.add((args, kwargs), count)
        raise _StopForward

    with (
        hooked({block: model.get_submodule(block)}, before=record),
        replaying(model, outputs or {}) as stands_in,
    ):
        chunks = [slice(start, start + batch) for start in range(0, len(data), batch)]
        other = slice(0, min(len(data), 2 if batch == 1 else 1))
        for chunk in (chunks[0], other, *chunks[1:]):
            for stand_in in stands_in:
                stand_in.part = chunk
            part = data.take(chunk)
            count = len(part)
            try:
                predict(model, part)
            except _StopForward:
                spill.release()
    args, kwargs = joined.joined()
    return args, kwargs


@torch.no_grad()
def capture_outputs(
    model: nn.Module,
    blocks: list[str],
    data: Trajectories,
    batch: int,
    spill: Spill | None = None,
) -> dict[str, Tensor]:
    """Outputs `[N, ...]` of each of `blocks` while `model` sees `data`, in one pass.

    `spill` makes them.
    """
    spill = spill or Spill()
    outputs = {block: Rows(len(data), spill) for block in blocks}

    def keep(block: str, _args: Any, _kwargs: Any, output: Any) -> None:
        outputs[block].add(joined_output(output))

    with hooked({block: model.get_submodule(block) for block in blocks}, after=keep):
        for start in range(0, len(data), batch):
            predict(model, data.take(slice(start, start + batch)))
    return {block: rows.joined() for block, rows in outputs.items()}


@torch.no_grad()
def execution_order(model: nn.Module, blocks: list[str], data: Trajectories) -> list[str]:
    """`blocks` in the order in which a forward first calls them."""
    order: list[str] = []
    modules = {block: model.get_submodule(block) for block in blocks}
    with hooked(modules, before=lambda block, *_: order.append(block)):
        predict(model, data.take(slice(0, 1)))
    return list(dict.fromkeys(order))
