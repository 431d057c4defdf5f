"""Replay of recorded block outputs, so that training a chain of blocks runs each block once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stepquant.calibration.nested import pick
from stepquant.calibration.trajectories import Trajectories
from stepquant.models.calling import named_arguments, tensors_in
from stepquant.models.hooks import hooked
from stepquant.models.surgery import replace_modules


class Replay(nn.Module):
    """Stand-in for a block that returns its recorded output.

    `output` is a tensor `[N, ...]` or a tuple of such tensors. `part` selects the samples of the
    next call. All other attributes, such as the dtype and the settings, are those of the block.
    """

    def __init__(self, block: nn.Module, output: Any) -> None:
        super().__init__()
        self.block = block
        self.output = output
        self.part = slice(None)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        """Return a copy of the recorded output, whatever the input; the model may write to it."""
        return copied(pick(self.output, self.part))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


@contextmanager
def replaying(model: nn.Module, outputs: Mapping[str, Any]) -> Iterator[list[Replay]]:
    """Replace each block named in `outputs` with a stand-in that returns the recorded output.

    Yields the stand-ins. Before each call of the model, the caller sets `part` of each stand-in to
    the samples of that call. The blocks are put back at the end.
    """
    stands_in: list[Replay] = []

    def install(name: str, block: nn.Module) -> nn.Module | None:
        if name not in outputs:
            return None
        stands_in.append(Replay(block, outputs[name]))
        return stands_in[-1]

    replace_modules(model, install)
    try:
        yield stands_in
    finally:
        replace_modules(model, lambda _, module: module.block if type(module) is Replay else None)


@torch.no_grad()
def readers(
    model: nn.Module, names: list[str], outputs: Mapping[str, Any], *call: Any, **named: Any
) -> dict[str, set[str]]:
    """Return, for each block in `outputs`, which of the blocks `names` read its output.

    A block counts as a reader only if no replayed block lies between the two. `outputs` holds the
    outputs of some blocks in the forward pass `model(*call, **named)`. The function replays these
    outputs, sets one of them to NaN at a time, and looks for NaN in the inputs of `names`. Little
    more than the glue between the blocks runs.
    """
    found: dict[str, set[str]] = {}
    with replaying(model, outputs) as stands_in:
        blocks = {name: model.get_submodule(name) for name in names}
        names_of = {block: name for name, block in blocks.items()}
        for source in stands_in:
            reached: set[str] = set()

            def look(
                name: str,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                reached: set[str] = reached,
            ) -> None:
                if any(bool(value.isnan().any()) for value in tensors_in((args, kwargs))):
                    reached.add(name)

            clean = source.output
            source.output = spoiled(clean)
            try:
                with hooked(blocks, before=look):
                    model(*call, **named)
            finally:
                source.output = clean
            found[names_of[source]] = reached
    return found


def copied(output: Any) -> Any:
    """Return `output` with each tensor copied."""
    return tree_map_only(Tensor, torch.clone, output)


def spoiled(output: Any) -> Any:
    """Return `output` with every tensor filled with NaN."""
    return tree_map_only(Tensor, lambda tensor: torch.full_like(tensor, torch.nan), output)


@dataclass(frozen=True)
class Replayable:
    """A block whose output can be recorded once and replayed.

    - `last`: position of the last block that reads the output; -1 if no block does.
    - `nbytes`: size of the output for one sample, in bytes.
    """

    last: int
    nbytes: int


@torch.no_grad()
def replayable_blocks(
    model: nn.Module, order: list[str], data: Trajectories
) -> dict[str, Replayable]:
    """Return the blocks that can be replayed, out of `order`, the blocks in execution order.

    A replayable block

    - returns float tensors with a row for each sample,
    - is called once per forward pass,
    - does not write to its inputs: other readers of these would miss the change.
    """
    calls: dict[str, list[Any]] = {name: [] for name in order}
    written: set[str] = set()
    versions: dict[str, list[int]] = {}

    def remember(name: str, *given: Any) -> None:
        versions[name] = [tensor._version for tensor in tensors_in(given)]

    def compare(name: str, args: Any, kwargs: Any, output: Any) -> None:
        calls[name].append(output)
        if versions[name] != [tensor._version for tensor in tensors_in((args, kwargs))]:
            written.add(name)

    one = data.take(slice(0, 1))
    named = named_arguments(model, one.conditions.arguments()) | {"timestep": one.timestep}
    with hooked({name: model.get_submodule(name) for name in order}, remember, compare):
        model(one.sample, **named)
    single = {name: found[0] for name, found in calls.items() if len(found) == 1}
    outputs = {name: y for name, y in single.items() if name not in written and _has_float_rows(y)}
    return {
        name: Replayable(
            max((order.index(reader) for reader in found), default=-1),
            sum(tensor.nbytes for tensor in tensors_in(outputs[name])),
        )
        for name, found in readers(model, order, outputs, one.sample, **named).items()
    }


def _has_float_rows(output: Any) -> bool:
    """Whether the output for one sample is a float tensor `[1, ...]`, or a tuple of these."""
    entries = output if type(output) is tuple else (output,)
    return all(
        e is None
        or (isinstance(e, Tensor) and e.is_floating_point() and e.dim() > 0 and len(e) == 1)
        for e in entries
    )
