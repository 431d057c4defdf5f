"""Inputs and outputs of single blocks over a calibration set."""

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
    """Raised by a hook that has the block's input, to skip the rest of the forward pass."""


@dataclass
class BlockData:
    """Training data of one block: inputs and target outputs for `N` samples.

    - `args`, `kwargs`: the block's arguments. Tensors are `[N, ...]`, also inside tuples and
      dictionaries. Tensors without a row for each sample are `Shared`. Other values are those of
      the first call.
    - `target`: the outputs to match, `[N, ...]`, in the form of `joined_output`.
    - `timestep`: `[N]`.
    - `spill`: the allocator of the tensors. `batch` releases its mapped memory after each read.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    timestep: Tensor
    spill: Spill = field(default_factory=Spill)

    def __len__(self) -> int:
        return self.target.shape[0]

    def batch(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any], Tensor, Tensor]:
        """Return `(args, kwargs, target, timestep)` of the samples at `index [B]`."""
        args, kwargs = pick((self.args, self.kwargs), index)
        target = self.target[index]
        self.spill.release()
        return args, kwargs, target, self.timestep[index]


def joined_output(output: Any) -> Tensor:
    """Return a block's output as one tensor `[N, ...]`.

    A single tensor is returned as it is. Several tensors are flattened and concatenated to
    `[N, values]`: blocks of some transformers return text tokens and image tokens.

    Raises:
        StepQuantError: the output holds no tensor.
    """
    if isinstance(output, Tensor):
        return output
    tensors = tensors_in(output)  # diffusers' output classes are dictionaries
    if not tensors:
        raise StepQuantError(
            f"a block returned {type(output).__name__} without a tensor: expected a tensor or a "
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
    """Run `model` on `data` and return the `(args, kwargs)` of `block`, joined over batches.

    Each forward pass stops at `block`. Joined tensors are `[N, ...]`; tensors without a row for
    each sample are `Shared`. `batch` is the number of samples per forward pass. One extra pass with
    another number of samples shows which tensors have rows.

    `outputs` holds the outputs `[N, ...]` of earlier blocks for `data`; those blocks do not run
    again. `spill` allocates the joined tensors, and must have allocated `outputs`.

    Raises:
        StepQuantError: a tensor has no row for each sample, but changes between calls.
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
    """Run `model` on `data` once and return the outputs of each of `blocks`, `[N, ...]`.

    The outputs have the form of `joined_output`. `batch` is the number of samples per forward pass.
    `spill` allocates the outputs.

    Raises:
        StepQuantError: a block's output holds no tensor.
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
    """Return `blocks` in the order of their first calls in a forward pass.

    Blocks that the model does not call are left out.
    """
    order: list[str] = []
    modules = {block: model.get_submodule(block) for block in blocks}
    with hooked(modules, before=lambda block, *_: order.append(block)):
        predict(model, data.take(slice(0, 1)))
    return list(dict.fromkeys(order))
