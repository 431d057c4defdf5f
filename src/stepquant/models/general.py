"""Adapter for any denoiser, built from its module tree and three forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.models.base import DiffusersAdapter, Folds
from stepquant.models.calling import call_denoiser, tensors_in
from stepquant.models.eligibility import LAYERS
from stepquant.models.hooks import hooked
from stepquant.models.inputs import Inputs
from stepquant.models.rewriting import name_before
from stepquant.support.errors import StepQuantError

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
BATCHES = (2, 3)  # batch sizes of the runs; a leading dimension that scales with them is per-sample


@dataclass
class _Call:
    """One call of a module in a forward pass."""

    name: str
    tensors: list[Tensor]  # among the arguments, nested ones too
    outputs: list[Tensor]


@dataclass
class _Survey:
    """Module calls observed in forward passes at both of `BATCHES`."""

    calls: tuple[list[_Call], list[_Call]]
    moved: list[_Call]  # calls at the first batch size, for another sample

    def of(self, name: str) -> list[tuple[_Call, _Call]]:
        """Return each call of the module `name`, as pairs over both batch sizes."""
        pairs = zip(*self.calls, strict=True)
        return [(two, three) for two, three in pairs if two.name == name]

    def order(self, names: set[str]) -> list[str]:
        """Return `names` in the order of their first calls."""
        called = [call.name for call in self.calls[0] if call.name in names]
        return list(dict.fromkeys(called))


class ModuleAdapter(DiffusersAdapter):
    """Adapter for a denoiser of unknown architecture.

    - `example(batch)`: arguments for the denoiser, in the form that the sampler passes.
    - `block_patterns`: shell-style patterns of block names. Without patterns, blocks are the
      children of module lists, module dicts and sequentials. They must hold quantizable layers, be
      called once per forward pass, and have one row per sample.
    - `float_patterns`: shell-style patterns of the layers that stay float.

    A layer outside every block is a unit of its own if it is called once and its tensors have one
    row per sample. Other layers are quantized, but steps that train block by block leave them out.

    The input layer is the first layer whose input depends on the sample. The output layer is the
    last layer called. The adapter folds nothing and splits no input: the activation quantizer
    applies every scaling, and a concatenation is quantized as one tensor.

    The adapter runs the model three times on `example` inputs and keeps the calls that it sees. It
    raises StepQuantError if the runs call different modules.
    """

    architecture = "nn.Module"

    def __init__(
        self,
        example: Callable[[int], Inputs],
        block_patterns: Sequence[str] = (),
        float_patterns: Sequence[str] = (),
    ) -> None:
        self._example = example
        self._block_patterns, self._float_patterns = tuple(block_patterns), tuple(float_patterns)
        self._surveyed: tuple[nn.Module, _Survey] | None = None

    def blocks(self, model: nn.Module) -> list[str]:
        """Names of the blocks, by pattern or by structure; see the class.

        Raises:
            StepQuantError: a pattern matches no module with layers, or a matching module cannot be
                a block.
        """
        found = self._named(model) if self._block_patterns else self._structural(model)
        for name, module in model.named_modules():
            inside = any(name == unit or name.startswith(f"{unit}.") for unit in found)
            if isinstance(module, LAYERS) and not inside and self._why_no_unit(model, name) is None:
                found.append(name)
        return found

    def input_output_layers(self, model: nn.Module) -> set[str]:
        """The first layer that sees the sample, and the last layer called.

        Raises:
            StepQuantError: no linear or conv layer sees the sample.
        """
        survey, layers = self._survey(model), _layers(model)
        depends = [
            one.name
            for one, other in zip(survey.calls[0], survey.moved, strict=True)
            if one.name in layers and _differ(one, other)
        ]
        if not depends:
            raise StepQuantError(
                f"{type(model).__name__} has no linear or conv layer that processes the sample: "
                "expected at least one that is called as a module"
            )
        return {depends[0], [c.name for c in survey.calls[0] if c.name in layers][-1]}

    def float_layers(self, model: nn.Module) -> dict[str, str]:
        """Layers that match `float_patterns`, and layers that cannot be simulated in their place.

        Raises:
            StepQuantError: a pattern matches no layer.
        """
        survey, layers = self._survey(model), _layers(model)
        reasons: dict[str, str] = {}
        for pattern in self._float_patterns:
            matching = [
                name
                for name in layers
                if fnmatchcase(name, pattern) or fnmatchcase(name_before(model, name), pattern)
            ]
            if not matching:
                raise StepQuantError(
                    f"the pattern '{pattern}' of layers that stay float matches none: expected one "
                    f"of layer names such as '{min(layers)}'"
                )
            reasons |= {name: f"asked for by '{pattern}'" for name in matching}
        for name in layers:
            pairs = survey.of(name)
            if not pairs:
                reasons.setdefault(name, "its weight is used without a call of the layer")
            elif not all(_rows(two.tensors[0], three.tensors[0]) for two, three in pairs):
                reasons.setdefault(name, "its input has no rows that belong to samples")
        return reasons

    def folds(self, model: nn.Module) -> Folds:
        """None: the adapter does not know which layer feeds which."""
        return []

    def relation_site(self, model: nn.Module) -> str:
        """The last block called that is neither the input layer nor the output layer."""
        outer = self.input_output_layers(model)
        order = [name for name in self._survey(model).order(set(self.blocks(model)))]
        inner = [name for name in order if name not in outer]
        return (inner or order)[-1]

    def random_inputs(self, model: nn.Module, batch: int) -> Inputs:
        """The arguments that `example(batch)` returns."""
        return self._example(batch)

    def _named(self, model: nn.Module) -> list[str]:
        holders = [name for name, module in model.named_modules() if name and _layers(module, name)]
        found: list[str] = []
        for pattern in self._block_patterns:
            matching = [name for name in holders if fnmatchcase(name, pattern)]
            if not matching:
                raise StepQuantError(
                    f"the block pattern '{pattern}' matches no module with linear or conv layers: "
                    f"expected one of module names such as '{holders[0]}'"
                )
            found += [name for name in matching if name not in found]
        for name in found:
            reason = self._why_no_unit(model, name)
            outer = [other for other in found if name.startswith(f"{other}.")]
            if outer:
                reason = f"lies in the block '{outer[0]}'"
            if reason is not None:
                raise StepQuantError(
                    f"the module '{name}' {reason}: expected blocks that are called once in a "
                    "forward, with a row for each sample, and not nested; choose other block "
                    "patterns"
                )
        return found

    def _structural(self, model: nn.Module) -> list[str]:
        found: list[str] = []

        def visit(module: nn.Module, prefix: str) -> None:
            for child, inner in module.named_children():
                name = prefix + child
                if isinstance(inner, LAYERS) or not _layers(inner, name):
                    continue
                if isinstance(module, CONTAINERS) and self._why_no_unit(model, name) is None:
                    found.append(name)
                else:
                    visit(inner, f"{name}.")

        visit(model, "")
        return found

    def _why_no_unit(self, model: nn.Module, name: str) -> str | None:
        """Return why the module `name` cannot be trained alone, as a predicate, or None."""
        pairs = self._survey(model).of(name)
        if len(pairs) != 1:
            return f"is called {len(pairs)} times in a forward"
        two, three = pairs[0]
        for kind in ("tensors", "outputs"):
            for a, b in zip(getattr(two, kind), getattr(three, kind), strict=True):
                each = a.dim() > 0 and (a.shape[0], b.shape[0]) == BATCHES
                if not each and (kind == "outputs" or a.shape != b.shape):
                    return f"takes or gives a tensor {list(a.shape)} for {BATCHES[0]} samples"
        if not two.outputs:
            return "gives no tensor"
        return None

    @torch.no_grad()
    def _survey(self, model: nn.Module) -> _Survey:
        if self._surveyed is None or self._surveyed[0] is not model:
            two, three = (self._example(batch) for batch in BATCHES)
            moved = (two[0] + 1.0, *two[1:])
            calls = [_calls(model, inputs) for inputs in (two, three, moved)]
            names = [[call.name for call in made] for made in calls]
            if names[0] != names[1] or names[0] != names[2]:
                raise StepQuantError(
                    f"{type(model).__name__} calls different modules for {BATCHES[1]} and "
                    f"{BATCHES[0]} samples, or for different samples: expected the same modules in "
                    "every call"
                )
            self._surveyed = (model, _Survey((calls[0], calls[1]), calls[2]))
        return self._surveyed[1]


def _layers(module: nn.Module, prefix: str = "") -> set[str]:
    """Return the names of the quantizable layers in `module`, which may be a layer itself."""
    return {
        ".".join(filter(None, (prefix, name)))
        for name, inner in module.named_modules()
        if isinstance(inner, LAYERS)
    }


def _calls(model: nn.Module, inputs: Inputs) -> list[_Call]:
    """Return every call of a submodule with layers, in the order in which the calls begin."""
    made: list[_Call] = []
    running: list[_Call] = []

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _Call(name, tensors_in((*args, *kwargs.values())), [])
        made.append(call)
        running.append(call)

    def leave(_name: str, _args: Any, _kwargs: Any, output: Any) -> None:
        running.pop().outputs = tensors_in(output)

    holders = {n: module for n, module in model.named_modules() if n and _layers(module)}
    with hooked(holders, enter, leave):
        call_denoiser(model, *inputs)
    return made


def _rows(two: Tensor, three: Tensor) -> bool:
    """Return whether the leading dimension of a layer's input scales with the number of samples."""
    if two.dim() < 2:
        return False
    (a, rest), (b, other) = divmod(two.shape[0], BATCHES[0]), divmod(three.shape[0], BATCHES[1])
    return a == b and rest == other == 0


def _differ(one: _Call, other: _Call) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))
