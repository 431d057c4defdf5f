"""Reading of a LoRA's tensors and settings from a file, a folder, the hub or memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from torch import Tensor

from stepquant.checkpoint.folder import HUB_ID, PICKLE_SUFFIXES
from stepquant.numerics.finite import all_finite
from stepquant.support.atomic import user_path
from stepquant.support.errors import StepQuantError
from stepquant.support.json_text import parse_json, read_json
from stepquant.support.safetensors_file import opened

USUAL_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT_CONFIG = "adapter_config.json"  # beside the tensors, if peft itself wrote them
HEADER_KEY = "lora_adapter_metadata"  # in the file's header, if diffusers wrote them
# Adapters that are not a plain product of two matrices, by a part of their keys.
OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_mid": "a LoRA with a core tensor (CP decomposition)",
}


@dataclass(frozen=True)
class LoraFile:
    """Tensors and settings of a LoRA, as read.

    - `label`: name of the LoRA in errors.
    - `tensors`: by the names in the file.
    - `configs`: peft's settings by component; the key "" stands for any component.
    """

    label: str
    tensors: dict[str, Tensor]
    configs: dict[str, dict[str, Any]]


def read_lora_file(
    source: str | os.PathLike[str] | Mapping[str, Tensor], weight_name: str | None = None
) -> LoraFile:
    """Read a LoRA.

    `source` is a safetensors file, a folder with one, a hub id, or tensors by name. `weight_name`
    selects a file in a folder or hub repository.

    Raises:
        StepQuantError: the LoRA is absent, damaged, pickled or empty, has values that are not
            floating-point or not finite, or is an adapter of another kind.
    """
    if isinstance(source, Mapping):
        label, tensors, configs = "the LoRA given as tensors", dict(source), {}
    else:
        path = _find(source, weight_name)
        label = f"the LoRA '{path}'"
        tensors, header = _read(path)
        configs = _configs(path, header)
    if not tensors:
        raise StepQuantError(f"{label} holds no tensor: expected pairs of lora_A and lora_B")
    for key, tensor in list(tensors.items()):
        for part, kind in OTHER_KINDS.items():
            if part in key:
                raise StepQuantError(
                    f"{label} has the key '{key}', so it is {kind}: expected a plain LoRA, of two "
                    "matrices for each layer"
                )
        if key.endswith(".alpha") and isinstance(tensor, Tensor):
            tensors[key] = tensor = tensor.float()  # kohya's trainer may store an integer
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise StepQuantError(
                f"{label} has {found} under '{key}': expected a floating-point tensor"
            )
        if not all_finite(tensor):
            raise StepQuantError(
                f"{label} has numbers that are not finite in '{key}': the file is damaged or its "
                "training diverged, so use another file"
            )
    return LoraFile(label, tensors, configs)


def _find(source: str | os.PathLike[str], weight_name: str | None) -> Path:
    path = user_path(source)
    if path.is_dir():
        path = path / (weight_name or _only_weights(path))
    elif "/" in str(source) and not path.exists() and HUB_ID.fullmatch(str(source)):
        path = _fetch(str(source), weight_name)
    if path.suffix in PICKLE_SUFFIXES:
        raise StepQuantError(
            f"'{path}' is a pickle: pickle files are refused because loading one can run any "
            "code; expected a LoRA as safetensors"
        )
    if not path.is_file():
        raise StepQuantError(
            f"the LoRA '{path}' does not exist: expected a safetensors file, a folder with one, or "
            "a hub id like 'org/name'"
        )
    return path


def _only_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    usual = [name for name in USUAL_NAMES if name in names]
    if len(names) == 1 or usual:
        return (usual or names)[0]
    found = f"the safetensors files {', '.join(names)}" if names else "no safetensors file"
    raise StepQuantError(
        f"the folder '{folder}' has {found}: expected one, or one called "
        f"{USUAL_NAMES[0]}; say which with weight_name"
    )


def _fetch(source: str, weight_name: str | None) -> Path:
    name = weight_name or USUAL_NAMES[0]
    try:
        return Path(hf_hub_download(source, name))
    except (OSError, ValueError) as error:
        raise StepQuantError(
            f"'{source}' is not a local file or folder, and '{name}' of a hub repository of that "
            f"name could not be fetched ({type(error).__name__}): check spelling and network, say "
            "which file with weight_name, or pass the path of a file"
        ) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with opened(path, "a LoRA") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _configs(path: Path, header: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return peft's settings by component, from the file's header or the JSON file beside it."""
    beside = path.parent / PEFT_CONFIG
    text = header.get(HEADER_KEY)
    what = "the settings of a LoRA, an object as peft writes it"
    if text is None and beside.is_file():
        return {"": _object(read_json(beside, what), f"'{beside}'", what)}
    configs: dict[str, dict[str, Any]] = {}
    where = f"the header of '{path}'"
    found = _object(parse_json(text or "{}", where, what), where, what)
    for key, value in found.items():
        # diffusers' `save_lora_adapter`, of one model, names no component.
        component, _, setting = key.rpartition(".")
        configs.setdefault(component, {})[setting] = value
    return configs


def _object(value: Any, where: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise StepQuantError(
            f"{where} holds a {type(value).__name__}: expected {what}; fetch or write the file "
            "again"
        )
    return value
