"""The safetensors files of one component in a diffusers folder, read tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.utils.constants import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stepquant.support.errors import StepQuantError

REMEDY = "fetch or write the folder again"


class WeightFiles:
    """Tensors of the component in `folder`, by name, from one file or from shards with an index.

    The constructor reads headers only. `meta` holds each tensor on the meta device.

    Raises:
        StepQuantError: a file is missing, damaged, or not safetensors. The message names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise StepQuantError(
                    f"'{index}' cannot be read as the index of shards ({error!r}): expected what "
                    f"save_pretrained writes; {REMEDY}"
                ) from error
            paths = [folder / name for name in sorted(names)]
        else:
            paths = [folder / SAFETENSORS_WEIGHTS_NAME]
        self._files: dict[str, Path] = {}
        self.meta: dict[str, Tensor] = {}  # each tensor on the meta device
        for path in paths:
            self._read_header(path)

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    # Memory-mapped: only the pages that are touched are read from disk.
                    tensor = file.get_tensor(name)
                    self.meta[name] = torch.empty_like(tensor, device="meta")
                    self._files[name] = path
        except (OSError, SafetensorError) as error:
            raise StepQuantError(
                f"'{path}' cannot be read as safetensors ({error}): expected the weights of "
                f"'{self.folder.name}'; {REMEDY}"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightFiles:
        return self  # immutable, so copies can share it

    @property
    def parameters(self) -> int:
        """Number of elements in all tensors."""
        return sum(tensor.numel() for tensor in self.meta.values())

    def read(self, name: str) -> Tensor:
        """Return the tensor `name`, memory-mapped: only the pages that are touched take memory.

        Each call maps the file again. A mapping's pages count as the process's memory until it is
        closed, so one mapping for all tensors would grow to the size of the file.
        """
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


def empty_model(folder: Path, what: str) -> Any:
    """Return the diffusers model of `folder/config.json` on the meta device, in eval mode.

    `what` names the model in errors.

    Raises:
        StepQuantError: the config is unreadable, names no diffusers model class, or is of a
            quantized model.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        name = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StepQuantError(
            f"'{path}' cannot be read as the config of {what} ({error!r}): expected that of a "
            "model of diffusers, the only kind that is packed without being loaded"
        ) from error
    kind: Any = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise StepQuantError(
            f"{what} is of the class {name}: expected a model class of the installed diffusers"
        )
    if "quantization_config" in config:
        raise StepQuantError(f"{what} is quantized already: expected a float model")
    with init_empty_weights():
        model: Any = kind.from_config(config)  # type: ignore[attr-defined]
    return model.eval()


def check_files(model: nn.Module, files: WeightFiles, what: str) -> None:
    """Check that `files` hold exactly the tensors of `model`, as floats of the same shapes.

    `what` names the model in errors.

    Raises:
        StepQuantError: a tensor is missing or unexpected, has another shape, or is not of a float
            dtype.
    """
    wanted = model.state_dict()
    for names, problem in (
        (wanted.keys() - files.meta.keys(), "lack the tensor"),
        (files.meta.keys() - wanted.keys(), "hold the unexpected tensor"),
    ):
        if names:
            raise StepQuantError(
                f"the files of {what} {problem} '{min(names)}': expected exactly the tensors that "
                f"its config.json describes; {REMEDY}"
            )
    for name, tensor in files.meta.items():
        if tensor.shape != wanted[name].shape or not tensor.is_floating_point():
            raise StepQuantError(
                f"tensor '{name}' of {what} is {tensor.dtype} of shape {list(tensor.shape)}: "
                f"expected floats of shape {list(wanted[name].shape)}; {REMEDY}"
            )
