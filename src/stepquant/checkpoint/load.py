"""Loading a pipeline, float or packed, with every failure told as one sentence."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from stepquant.checkpoint.folder import (
    DIFFUSERS_ERRORS,
    HUB_ID,
    PICKLE_SUFFIXES,
    check_folder,
    first_line,
)
from stepquant.checkpoint.single_file import load_single_file
from stepquant.support.errors import StepQuantError

if TYPE_CHECKING:  # slow to import, see load_pipeline
    import torch
    from diffusers import DiffusionPipeline

SINGLE_FILE = ".safetensors"


def load_pipeline(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    config: str | os.PathLike[str] | None = None,
    parts: Mapping[str, Any] | None = None,
) -> DiffusionPipeline:
    """The pipeline in the folder or file `source`, or of the hub id `source` ("org/name").

    `dtype`: that of the float parts; packed layers keep their float32 scales. `revision`:
    branch, tag or commit on the hub. `config`: for a single safetensors file of a float pipeline,
    the folder or hub id with what the file has not (`checkpoint.single_file`). `parts`: components
    by name that are not to be loaded from a folder or the hub.

    Raises StepQuantError, naming the file or tensor, for a folder that is absent, incomplete,
    damaged, pickled or of a newer format, and for a hub id that cannot be fetched.
    """
    # Only whoever loads a pipeline waits for diffusers to import all of them.
    from diffusers import DiffusionPipeline

    if is_single_file(source):
        pipeline = load_single_file(Path(source).expanduser(), dtype=dtype, config=config)
        _check_complete(str(source), pipeline)
        return pipeline
    if config is not None:
        raise StepQuantError(
            f"a config, '{config}', was given for '{source}', which is no single safetensors file: "
            "expected none, because a folder or a hub id has its own"
        )
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
            f"'{source}' cannot be loaded ({first_line(error)}): expected a complete diffusers "
            "pipeline folder"
        ) from error
    _check_complete(str(source), pipeline)
    return pipeline


def local_folder(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder `source`, or the local copy of the hub's pipeline of that id."""
    from diffusers import DiffusionPipeline

    folder = Path(source).expanduser()
    return folder if folder.is_dir() else _fetch(str(source), revision, DiffusionPipeline)


def is_single_file(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is a file that is opened as one, or refused as a pickle."""
    path = Path(source).expanduser()
    return path.is_file() and path.suffix in (SINGLE_FILE, *PICKLE_SUFFIXES)


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


def _fetch(source: str, revision: str | None, pipeline_class: Any) -> Path:
    """The local copy of the hub's pipeline `source`."""
    if Path(source).exists():
        raise StepQuantError(
            f"'{source}' is a file: expected a diffusers pipeline folder, a hub id, or a "
            "safetensors file"
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
        f"the model '{source}' could not be fetched from the hub ({first_line(error)}): expected "
        "a diffusers pipeline with safetensors weights; pass the path of a local folder instead"
    )
