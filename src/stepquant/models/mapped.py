"""A float model whose large weights stay in their files and are read at each use.

Every read gives exactly the float32 numbers of a loaded model. It takes the memory of one layer,
whatever the size of the model. The operating system caches the files' pages in free memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from stepquant.models.eligibility import shared_weights, why_float
from stepquant.models.weight_files import WeightFiles, check_files, empty_model


class Mapped(nn.Module):
    """A layer whose `weight` is in a file instead of a parameter."""

    files: WeightFiles
    key: str

    @property
    def weight(self) -> Tensor:
        """A float32 copy of the weight in the file.

        Float32 weights are copied too. Tensors in a file are aligned differently from other
        tensors, and a kernel may sum in another order there.
        """
        return self.files.read(self.key).to(torch.float32, copy=True)

    def loaded(self) -> nn.Module:
        """Return a plain layer with this weight in memory, without gradients."""
        plain = copy.copy(self)
        plain.__class__ = next(  # type: ignore[assignment]  # the class without the mapping
            kind for kind, mapped in KINDS.items() if type(self) is mapped
        )
        plain._parameters = {"weight": nn.Parameter(self.weight, False), **self._parameters}
        return plain


class MappedLinear(Mapped, nn.Linear):  # type: ignore[override]  # the weight is read only
    """`nn.Linear` whose weight is in a file."""


class MappedConv2d(Mapped, nn.Conv2d):  # type: ignore[override]  # the weight is read only
    """`nn.Conv2d` whose weight is in a file."""


KINDS: dict[type[nn.Module], type[Mapped]] = {nn.Linear: MappedLinear, nn.Conv2d: MappedConv2d}


def open_mapped(folder: Path, what: str) -> Any:
    """Open the diffusers model in `folder` in float32, with its layers' weights left on disk.

    `what` names the model in errors. The function maps the weights of linear and conv layers,
    except those that several modules share. It loads everything else. The files must not change
    while the model is in use. The model is for inference only: no parameter requires gradients.

    Raises:
        StepQuantError: `folder` is missing, damaged, or does not hold a diffusers model.
    """
    model = empty_model(folder, what)
    files = WeightFiles(folder).named_for(model)
    check_files(model, files, what)
    shared = shared_weights(model)
    for name, module in list(model.named_modules()):
        if why_float(module, any_conv=True, shared=shared) is None:
            del module._parameters["weight"]
            module.__class__ = KINDS[type(module)]
            module.files, module.key = files, f"{name}.weight"
    for name in model.state_dict():
        value = files.read(name).to(torch.float32, copy=True)
        set_module_tensor_to_device(model, name, "cpu", value)
    model.register_to_config(_name_or_path=str(folder))
    return model.requires_grad_(False)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield `model.named_parameters()`, then the mapped weights, reading one at a time."""
    yield from model.named_parameters()
    for module in model.modules():
        if isinstance(module, Mapped):
            yield module.key, module.weight


class FloatState(Mapping[str, Tensor]):
    """Like `model.state_dict()`, plus the mapped weights, each read on access."""

    def __init__(self, model: nn.Module) -> None:
        self._held = model.state_dict()
        self._mapped = {m.key: m for m in model.modules() if isinstance(m, Mapped)}

    def __getitem__(self, name: str) -> Tensor:
        return self._mapped[name].weight if name in self._mapped else self._held[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._held
        yield from self._mapped

    def __len__(self) -> int:
        return len(self._held) + len(self._mapped)

    def sizes(self) -> dict[str, int]:
        """Return the number of elements of each tensor, without reading any."""
        found = {name: tensor.numel() for name, tensor in self._held.items()}
        return found | {key: m.files.meta[key].numel() for key, m in self._mapped.items()}
