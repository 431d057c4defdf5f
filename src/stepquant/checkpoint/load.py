"""Loading of float and packed pipelines, with one-sentence errors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from stepquant.checkpoint.file_sums import SUMS_NAME, check_sums, read_sums
from stepquant.checkpoint.folder import (
    HUB_ID,
    INDEX_NAME,
    PICKLE_SUFFIXES,
    absent_components,
    check_folder,
    read_index,
    variant_of,
)
from stepquant.checkpoint.single_file import load_single_file
from stepquant.support.atomic import user_path
from stepquant.support.errors import StepQuantError
from stepquant.support.safetensors_file import first_line

if TYPE_CHECKING:  # slow to import; load_pipeline imports it
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
    """Load a pipeline from a folder, a single file or the hub.

    Args:
        source: diffusers folder, single safetensors file of a float pipeline, or hub id
            ("org/name").
        dtype: dtype of the float parts; packed layers keep their float32 scales. None leaves the
            choice to diffusers.
        revision: branch, tag or commit on the hub.
        config: for a single file, the folder or hub id of a pipeline of the same kind, which has
            everything but the tensors; see `checkpoint.single_file`.
        parts: components to use as they are, by name, in place of those in the folder.

    Raises:
        StepQuantError: the folder is absent, incomplete, damaged, pickled or of a newer format, the
            hub id cannot be fetched, or `config` is given for anything but a single file. The
            message names the file or tensor.
    """
    # Imported here: diffusers is slow to import, and not every command loads a pipeline.

    if is_single_file(source):
        pipeline = load_single_file(user_path(source), dtype=dtype, config=config)
        _check_complete(str(source), pipeline)
        return pipeline
    if config is not None:
        raise StepQuantError(
            f"the config '{config}' was given for '{source}', which is not a single safetensors "
            "file: expected no config; leave it out, because a folder or a hub id has its own"
        )
    folder = local_folder(source, revision)
    check_folder(folder)
    check_sums(folder)
    kind = _pipeline_class(folder)
    # diffusers wants to be told of components that the pipeline goes without.
    given = {**dict.fromkeys(absent_components(folder)), **(parts or {})}
    try:
        pipeline = kind.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            variant=variant_of(folder),
            **given,
        )
    except StepQuantError as error:
        raise StepQuantError(f"'{source}' cannot be loaded: {error}") from error
    except Exception as error:  # whatever the libraries make of values that they do not expect
        raise StepQuantError(
            f"'{source}' cannot be loaded ({type(error).__name__}: {first_line(error)}): expected "
            "a complete diffusers pipeline folder"
        ) from error
    _check_complete(str(source), pipeline)
    return pipeline


def local_folder(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the folder `source`, or the local copy of the hub's pipeline with that id.

    Raises:
        StepQuantError: `source` is a file, no folder or hub id, or cannot be fetched.
    """
    from diffusers import DiffusionPipeline

    folder = user_path(source)
    return folder if folder.is_dir() else _fetch(str(source), revision, DiffusionPipeline)


def _pipeline_class(folder: Path) -> Any:
    """Return the class that loads the pipeline in `folder`.

    diffusers finds its own classes. A class of the user's is found if it has been imported.

    Raises:
        StepQuantError: neither has a class of the name in the index.
    """
    import diffusers

    name = read_index(folder / INDEX_NAME)["_class_name"]
    if not isinstance(name, str) or name in dir(diffusers):
        return diffusers.DiffusionPipeline
    known = [diffusers.DiffusionPipeline]
    for kind in known:  # grows
        known += [sub for sub in kind.__subclasses__() if sub not in known]
    own = [kind for kind in known if kind.__name__ == name]
    if not own:
        raise StepQuantError(
            f"'{folder}' is of the pipeline class '{name}', which the installed diffusers does not "
            "have: expected a class that is imported; import the module that defines it, and load "
            "the folder in the same program"
        )
    return own[-1]


def is_single_file(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is a file that `load_pipeline` opens as one, or refuses as a pickle."""
    path = user_path(source)
    return path.is_file() and path.suffix in (SINGLE_FILE, *PICKLE_SUFFIXES)


def _check_complete(source: str, pipeline: Any) -> None:
    """Check that every tensor has data; diffusers leaves those that the files lack on meta.

    Raises:
        StepQuantError: a tensor has no data.
    """
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
    """Return the local copy of the hub's pipeline `source`."""
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
        folder = Path(pipeline_class.download(source, revision=revision, use_safetensors=True))
        _fetch_sums(source, folder)
        return folder
    except StepQuantError:
        raise
    except (OSError, ValueError) as error:
        raise _fetch_error(source, error) from error


def _fetch_sums(source: str, folder: Path) -> None:
    """Fetch the digests of the hub's pipeline `source` to `folder`, and the files that they name.

    diffusers fetches only what it reads. Without a connection, or without digests on the hub, the
    folder stays as it is, and is loaded without this check.
    """
    if folder.parent.name != "snapshots":
        return
    commit = folder.name
    with suppress(EntryNotFoundError):
        path = Path(hf_hub_download(source, SUMS_NAME, revision=commit))
        for name in read_sums(path):
            below = not Path(name).is_absolute() and ".." not in Path(name).parts
            if below and not (folder / name).is_file():
                hf_hub_download(source, name, revision=commit)


def _fetch_error(source: str, error: Exception) -> StepQuantError:
    # diffusers raises a plain OSError for everything; the causes tell the failures apart.
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
