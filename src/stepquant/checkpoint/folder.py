"""Checks of a pipeline's folder and files before diffusers reads them."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stepquant.checkpoint.architecture import check_written
from stepquant.models.weight_files import shard_names, variants_of
from stepquant.support.errors import StepQuantError
from stepquant.support.json_text import read_json
from stepquant.support.safetensors_file import opened

INDEX_NAME = "model_index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MOST_STEPS = 1_000_000  # of a scheduler's training, which it makes tables for; usual are 1000
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check_folder(folder: Path) -> None:
    """Check that `folder` is a complete pipeline folder.

    Raises:
        StepQuantError: the index is missing or unreadable, a component's folder is missing, the
            package transformers is needed but not installed, a component has weights only as a
            pickle, or one of its files is cut short or damaged.
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
        check_part(part)


def read_index(path: Path) -> dict[str, Any]:
    """Return the pipeline index at `path`, which names the pipeline's class and components.

    Raises:
        StepQuantError: the file is not JSON, or names no pipeline class.
    """
    index = read_json(path, "the index of a pipeline")
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


def absent_components(folder: Path) -> list[str]:
    """Return the components that the index of `folder` lists as None.

    Raises:
        StepQuantError: the index is not JSON, or names no pipeline class.
    """
    index = read_index(folder / INDEX_NAME)
    return [name for name, entry in index.items() if entry == [None, None] and name[:1] != "_"]


def variant_of(folder: Path) -> str | None:
    """Return the variant, such as "fp16", that the pipeline in `folder` is there in.

    The result is None if each component has weights without a variant, or none at all.

    Raises:
        StepQuantError: components are there only in different variants.
    """
    needed = {
        name: variants
        for name in read_components(folder)
        if (folder / name).is_dir() and (variants := variants_of(folder / name))
    }
    if not needed:
        return None
    common = set.intersection(*needed.values())
    if len(common) != 1:
        found = "; ".join(f"{name}: {', '.join(sorted(v))}" for name, v in needed.items())
        raise StepQuantError(
            f"'{folder}' has weights only in variants ({found}): expected one variant that all "
            "these components have; delete the others"
        )
    return common.pop()


def check_part(part: Path) -> None:
    """Check the files in a component's folder `part` before a model is built from them.

    Raises:
        StepQuantError: the weights or a config are damaged, or the config would take far more
            memory than its values need.
    """
    check_weights(part)
    for name in ("config.json", "scheduler_config.json"):
        path = part / name
        if not path.is_file():
            continue
        config = read_json(path, f"the config of '{part.name}'")
        if not isinstance(config, dict):
            raise StepQuantError(
                f"'{path}' holds a {type(config).__name__}: expected an object with named values; "
                "fetch or write the folder again"
            )
        steps = config.get("num_train_timesteps")
        if isinstance(steps, int | float) and not steps <= MOST_STEPS:
            raise StepQuantError(
                f"num_train_timesteps in '{path}' is {steps!r}: expected at most {MOST_STEPS}; "
                "fetch or write the folder again"
            )
        check_written(path, config)


def check_weights(part: Path) -> None:
    """Check the weight files in a component's folder `part`; a component may have none.

    Raises:
        StepQuantError: the weights are there only as a pickle, or a safetensors file is cut short
            or damaged.
    """
    try:
        files = sorted(path for path in part.iterdir() if path.is_file())
    except OSError as error:
        raise StepQuantError(
            f"'{part}' cannot be read ({error.strerror}): expected the folder of a component; "
            "check its permissions"
        ) from error
    weights = [path for path in files if path.suffix == ".safetensors"]
    pickles = [path for path in files if path.suffix in PICKLE_SUFFIXES]
    if pickles and not weights:
        raise StepQuantError(
            f"'{part}' holds its weights only as a pickle ('{pickles[0].name}'): pickle files are "
            "refused because loading one can run any code; expected safetensors"
        )
    for path in weights:
        check_weight_file(path)
    for path in files:
        if ".safetensors.index." in path.name and path.suffix == ".json":
            shard_names(path)


def check_weight_file(path: Path) -> None:
    """Check that `path` is a whole safetensors file, by its header and its size.

    Raises:
        StepQuantError: the file is cut short, damaged, not in that format, or cannot be read.
    """
    with opened(path):
        pass
