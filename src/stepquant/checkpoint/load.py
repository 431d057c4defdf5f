"""Loading a pipeline, float or packed, with every failure told as one sentence."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open

from stepquant.errors import StepQuantError

if TYPE_CHECKING:  # slow to import, see load_pipeline
    import torch
    from diffusers import DiffusionPipeline

INDEX_NAME = "model_index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What diffusers was seen to raise for a folder with something wrong in it.
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


def load_pipeline(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    parts: Mapping[str, Any] | None = None,
) -> DiffusionPipeline:
    """The pipeline in the diffusers folder `source`, or of the hub id `source` ("org/name").

    `dtype`: that of the float parts; packed layers keep their float32 scales. `revision`:
    branch, tag or commit on the hub. `parts`: components by name that are not to be loaded.

    Raises StepQuantError, naming the file or tensor, for a folder that is absent, incomplete,
    damaged, pickled or of a newer format, and for a hub id that cannot be fetched.
    """
    # Only whoever loads a pipeline waits for diffusers to import all of them.
    from diffusers import DiffusionPipeline

    folder = local_folder(source, revision)
    check_folder(folder)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, local_files_only=True, **(parts or {})
        )
    except StepQuantError as error:
        raise StepQuantError(f"'{source}' cannot be loaded: {error}") from error
    except DIFFUSERS_ERRORS as error:
        raise StepQuantError(
            f"'{source}' cannot be loaded ({_first_line(error)}): expected a complete diffusers "
            "pipeline folder"
        ) from error
    _check_complete(str(source), pipeline)
    return pipeline


def local_folder(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder `source`, or the local copy of the hub's pipeline of that id."""
    from diffusers import DiffusionPipeline

    folder = Path(source).expanduser()
    return folder if folder.is_dir() else _fetch(str(source), revision, DiffusionPipeline)


def read_index(folder: Path) -> dict[str, Any]:
    """The components that the index of `folder` names: `[library, class]` of each."""
    index = _read_index(folder / INDEX_NAME)
    return {name: entry for name, entry in index.items() if _is_component(entry)}


def _check_complete(source: str, pipeline: Any) -> None:
    """Diffusers leaves a parameter without data where the files have none of that name."""
    for part, component in pipeline.components.items():
        if not hasattr(component, "named_parameters"):
            continue
        for name, tensor in (*component.named_parameters(), *component.named_buffers()):
            if tensor.is_meta:
                raise StepQuantError(
                    f"'{source}' has no tensor '{name}' in the files of '{part}': expected every "
                    "parameter that its config.json describes; fetch or write the folder again"
                )


def check_folder(folder: Path) -> None:
    """A pipeline folder with a readable index, all its parts, and whole safetensors files."""
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
    for name, entry in _read_index(index).items():
        if name.startswith("_") or not _is_component(entry):
            continue
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
        _check_weights(part)


def _fetch(source: str, revision: str | None, pipeline_class: Any) -> Path:
    """The local copy of the hub's pipeline `source`."""
    if Path(source).exists():
        raise StepQuantError(
            f"'{source}' is a file: expected a diffusers pipeline folder or a hub id"
        )
    if not HUB_ID.fullmatch(source):
        raise StepQuantError(
            f"the folder '{source}' does not exist: expected a diffusers pipeline folder or a hub "
            "id like 'org/name'"
        )
    try:
        return Path(pipeline_class.download(source, revision=revision, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise _fetch_error(source, error) from error


def _fetch_error(source: str, error: Exception) -> StepQuantError:
    # diffusers raises a plain OSError for everything; what happened is in its causes.
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return StepQuantError(
            f"'{source}' is neither a local folder nor a model that the hub shows you: check the "
            "spelling, log in for a private model, or pass the path of a local folder"
        )
    answered = any(isinstance(cause, HfHubHTTPError) for cause in causes)
    if not answered and any(isinstance(cause, OSError) for cause in causes[1:]):
        return StepQuantError(
            f"'{source}' is not a local folder, and the hub could not be reached to fetch the "
            "model of that name: check the network, or pass the path of a local folder "
            "(./path/to/folder)"
        )
    return StepQuantError(
        f"the model '{source}' could not be fetched from the hub ({_first_line(error)}): expected "
        "a diffusers pipeline with safetensors weights; pass the path of a local folder instead"
    )


def _read_index(path: Path) -> dict[str, Any]:
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


def _is_component(entry: Any) -> bool:
    """Whether an entry of the index is a `[library, class]` pair that is not null."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)


def _check_weights(part: Path) -> None:
    files = sorted(path for path in part.iterdir() if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    pickles = [path for path in files if path.suffix in PICKLE_SUFFIXES]
    if pickles and not weights:
        raise StepQuantError(
            f"'{part}' holds its weights only as a pickle ('{pickles[0].name}'): pickle files are "
            "refused because loading one can run any code; expected safetensors"
        )
    for path in weights:
        try:
            with safe_open(path, framework="pt"):  # reads the header and compares the file's size
                pass
        except (SafetensorError, OSError) as error:
            raise StepQuantError(
                f"'{path}' is not a whole safetensors file ({_first_line(error)}): it is cut "
                "short or damaged, so fetch or write it again"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
