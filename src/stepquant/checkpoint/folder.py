"""Checks of a pipeline's folder and files before diffusers reads them."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stepquant.support.errors import StepQuantError

INDEX_NAME = "model_index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Exceptions that diffusers was seen to raise for broken folders.
DIFFUSERS_ERRORS = (
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check_folder(folder: Path) -> None:
    """Check that `folder` is a complete pipeline folder.

    Raises:
        StepQuantError: the index is missing or unreadable, a component's folder is missing, the
            package transformers is needed but not installed, a component has weights only as a
            pickle, or a safetensors file is cut short or damaged.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        hint = (
            "; this is one component, so pass the folder above it"
            if (folder / "config.json").is_file()
            else "; this is a packed module, so build the module and call load_module on it"
            if (folder / "denoiser" / "config.json").is_file()
            else ""
        )
        raise StepQuantError(
            f"'{folder}' holds no {INDEX_NAME}: expected a diffusers pipeline folder, as "
            f"save_pretrained writes it{hint}"
        )
    for name, entry in read_components(folder).items():
        if entry[0] == "transformers" and find_spec("transformers") is None:
            raise StepQuantError(
                f"'{folder}' has the {entry[1]} '{name}' of the package transformers, which is not "
                "installed: expected it for texts; pip install 'stepquant[text]'"
            )
        part = folder / name
        if not part.is_dir():
            raise StepQuantError(
                f"'{folder}' has no folder '{name}': expected the {entry[1]} that its "
                f"{INDEX_NAME} names; fetch or write the folder again"
            )
        check_weights(part)


def read_index(path: Path) -> dict[str, Any]:
    """Return the pipeline index at `path`, which names the pipeline's class and components.

    Raises:
        StepQuantError: the file is not JSON, or names no pipeline class.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StepQuantError(
            f"'{path}' is not readable as JSON ({error}): fetch or write the folder again"
        ) from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise StepQuantError(
            f"'{path}' names no pipeline class: expected an object with '_class_name', as "
            "save_pretrained writes it"
        )
    return index


def read_components(folder: Path) -> dict[str, list[str]]:
    """Return `[library, class]` of each component that the index of `folder` names.

    Raises:
        StepQuantError: the index is not JSON, or names no pipeline class.
    """
    index = read_index(folder / INDEX_NAME)
    return {
        name: entry
        for name, entry in index.items()
        if not name.startswith("_") and _is_component(entry)
    }


def _is_component(entry: Any) -> bool:
    """Whether an entry of the index is a `[library, class]` pair that is not null."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)


def check_weights(part: Path) -> None:
    """Check the weight files in a component's folder `part`; a component may have none.

    Raises:
        StepQuantError: the weights are there only as a pickle, or a safetensors file is cut short
            or damaged.
    """
    files = sorted(path for path in part.iterdir() if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    pickles = [path for path in files if path.suffix in PICKLE_SUFFIXES]
    if pickles and not weights:
        raise StepQuantError(
            f"'{part}' holds its weights only as a pickle ('{pickles[0].name}'): pickle files are "
            "refused because loading one can run any code; expected safetensors"
        )
    for path in weights:
        check_weight_file(path)


def check_weight_file(path: Path) -> None:
    """Check that `path` is a whole safetensors file, by its header and its size.

    Raises:
        StepQuantError: the file is cut short, damaged or not in that format.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise StepQuantError(
            f"'{path}' is not a whole safetensors file ({first_line(error)}): it is cut "
            "short or damaged, so fetch or write it again"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of another library's error message, without its period."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
