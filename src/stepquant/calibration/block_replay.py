"""Recorded outputs in the place of blocks, so that a chain of blocks runs each of them once."""

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
    """Stands in for a block and gives `output`, `[N, ...]` or a tuple, of the samples in `part`.

    All else that a model may ask of its block (dtype, settings) is the block's own.
    """

    def __init__(self, block: nn.Module, output: Any) -> None:
        super().__init__()
        self.block = block
        self.output = output
        self.part = slice(None)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        """What was recorded, whatever the input: a copy, which the model may write into."""
        return copied(pick(self.output, self.part))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


@contextmanager
def replaying(model: nn.Module, outputs: Mapping[str, Any]) -> Iterator[list[Replay]]:
    """`model` with each of the blocks `outputs` replaced by what it gave; the stand-ins.

    Whoever calls the model says first, by `part` of each stand-in, which samples it gets.
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
    """For each block of `outputs`, those of `names` that read it without a replayed one between.

    `model(*call, **named)` is one forward, `outputs` what some of its blocks give in it. With these
    replayed little runs but the glue between blocks; who reads a block's output is found by making
    it NaN.
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
    """`output` with a copy of each tensor."""
    return tree_map_only(Tensor, torch.clone, output)


def spoiled(output: Any) -> Any:
    """`output` with NaN for every value."""
    return tree_map_only(Tensor, lambda tensor: torch.full_like(tensor, torch.nan), output)


@dataclass(frozen=True)
class Replayable:
    """A block whose output can be recorded once and given again.

    `last`: position of the last block that reads it, -1 where none does. `nbytes`: of one sample's.
    """

    last: int
    nbytes: int


@torch.no_grad()
def replayable_blocks(
    model: nn.Module, order: list[str], data: Trajectories
) -> dict[str, Replayable]:
    """Those of the blocks `order` (as a forward calls them) that can be replayed.

    They give float tensors with a row for each sample, are called once in a forward, and do not
    write into what they are given: whoever else reads that would miss it.
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
    """Whether the output for one sample is a float tensor with a row for it, or a tuple of such."""
    entries = output if type(output) is tuple else (output,)
    return all(
        e is None
        or (isinstance(e, Tensor) and e.is_floating_point() and e.dim() > 0 and len(e) == 1)
        for e in entries
    )
