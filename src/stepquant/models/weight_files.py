"""The safetensors files of one component in a diffusers folder, read tensor by tensor."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.utils.constants import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from stepquant.support.errors import StepQuantError
from stepquant.support.json_text import read_json
from stepquant.support.safetensors_file import first_line, opened

REMEDY = "fetch or write the folder again"
SHARD = r"(-\d{5}-of-\d{5})?"
STEMS = "diffusion_pytorch_model", "model"
PLAIN = re.compile(rf"({'|'.join(STEMS)}){SHARD}\.safetensors")
VARIANT = re.compile(rf"({'|'.join(STEMS)})\.([\w-]+?){SHARD}\.safetensors")


def variants_of(folder: Path) -> set[str]:
    """Return the variants, such as "fp16", that the component in `folder` has its weights in.

    The result is empty if weights without a variant are there, or none at all.
    """
    names = [path.name for path in folder.glob("*.safetensors")]
    if any(PLAIN.fullmatch(name) for name in names):
        return set()
    return {match[2] for match in map(VARIANT.fullmatch, names) if match}


def without_variant(path: Path, name: str | None = None) -> str:
    """Return the name of the weights or index `path` without its variant.

    `name` is that of another file beside it. A name stays as it is if the folder has weights
    without a variant, several variants, or another one.
    """
    name = name or path.name
    variants = variants_of(path.parent)
    if len(variants) != 1:
        return name
    (variant,) = variants
    for stem in STEMS:
        for ending in (f".{variant}.safetensors", f".safetensors.index.{variant}.json"):
            if name == stem + ending:
                return stem + ending.replace(f".{variant}", "")
        shard = re.fullmatch(rf"{stem}\.{re.escape(variant)}({SHARD})\.safetensors", name)
        if shard:
            return f"{stem}{shard[1]}.safetensors"
    return name


def shard_names(index: Path) -> list[str]:
    """Return the file names in the index of shards `index`, sorted.

    Raises:
        StepQuantError: the index cannot be read, or names a file in another folder.
    """
    values = read_json(index, "the index of shards, as save_pretrained writes it")
    shards = values.get("weight_map") if isinstance(values, dict) else None
    named = isinstance(shards, dict) and all(isinstance(name, str) for name in shards.values())
    if not named or not shards:
        raise StepQuantError(
            f"'{index}' cannot be read as the index of shards: expected a file for each tensor in "
            f"its 'weight_map', as save_pretrained writes it; {REMEDY}"
        )
    for name in sorted(set(shards.values())):
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise StepQuantError(
                f"'{index}' names the shard '{name}': expected the name of a file beside it, "
                f"without a folder; {REMEDY}"
            )
    return sorted(set(shards.values()))


def weight_paths(folder: Path) -> list[Path]:
    """Return the safetensors files of the component in `folder`: one, or the shards of its index.

    Raises:
        StepQuantError: the index cannot be read, or the weights are there in several variants.
    """
    variants = sorted(variants_of(folder))
    if len(variants) > 1:
        raise StepQuantError(
            f"'{folder}' holds its weights in the variants {', '.join(variants)}: expected weights "
            "without a variant, or one variant; delete the others"
        )
    infix = f".{variants[0]}" if variants else ""
    # The variant stands before the last suffix of the one, and before ".index" of the other.
    index = folder / SAFE_WEIGHTS_INDEX_NAME.replace(".json", f"{infix}.json")
    if index.is_file():
        return [folder / name for name in shard_names(index)]
    return [folder / SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", f"{infix}.safetensors")]


class WeightFiles:
    """Tensors of the component in `folder`, by name, from one file or from shards with an index.

    Weights that are there only in a variant, such as "fp16", are those of the component. The
    constructor reads headers only. `meta` holds each tensor on the meta device.

    Raises:
        StepQuantError: a file is missing, damaged, or not safetensors. The message names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._keys: dict[str, str] = {}  # names in the files
        self.meta: dict[str, Tensor] = {}  # each tensor on the meta device
        paths = weight_paths(folder)
        self._sharded = len(paths) > 1
        for path in paths:
            self._read_header(path)

    def _read_header(self, path: Path) -> None:
        with opened(path, f"the weights of '{self.folder.name}'") as file:
            for name in file.keys():  # noqa: SIM118
                # Memory-mapped: only the pages that are touched are read from disk.
                tensor = file.get_tensor(name)
                self.meta[name] = torch.empty_like(tensor, device="meta")
                self._files[name] = path
                self._keys[name] = name

    def named_for(self, model: Any) -> WeightFiles:
        """Return these files with the names that `model` has for their tensors.

        Older releases of diffusers called attention's projections by other names; diffusers renames
        them as it loads a model whose weights are in one file.
        """
        renamed = {name: name for name in self.meta}
        if not self._sharded and hasattr(model, "_fix_state_dict_keys_on_load"):
            model._fix_state_dict_keys_on_load(renamed)
        found = copy.copy(self)
        found.meta = {new: self.meta[old] for new, old in renamed.items()}
        found._files = {new: self._files[old] for new, old in renamed.items()}
        found._keys = {new: self._keys[old] for new, old in renamed.items()}
        return found

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

        Raises:
            StepQuantError: the file has gone or changed.
        """
        with opened(self._files[name]) as file:
            return file.get_tensor(self._keys[name])


def empty_model(folder: Path, what: str) -> Any:
    """Return the diffusers model of `folder/config.json` on the meta device, in eval mode.

    `what` names the model in errors.

    Raises:
        StepQuantError: the config is unreadable, names no diffusers model class, does not fit that
            class, or is of a quantized model.
    """
    path = folder / "config.json"
    config = read_json(path, f"the config of {what}")
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise StepQuantError(
            f"'{path}' cannot be read as the config of {what}: expected that of a model of "
            "diffusers, the only kind that is packed without being loaded"
        )
    kind: Any = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise StepQuantError(
            f"{what} is of the class {name}: expected a model class of the installed diffusers"
        )
    if config.get("quantization_config") is not None:
        raise StepQuantError(f"{what} is quantized already: expected a float model")
    try:
        with init_empty_weights():
            model: Any = kind.from_config(config)  # type: ignore[attr-defined]
    except Exception as error:  # whatever the class makes of values that it does not expect
        raise StepQuantError(
            f"no {name} can be built from '{path}' ({type(error).__name__}: {first_line(error)}): "
            f"expected the config of {what}; {REMEDY}"
        ) from error
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
