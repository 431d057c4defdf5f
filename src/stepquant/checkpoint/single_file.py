"""Loading of a float pipeline from one safetensors file in the layout of its original trainer.

diffusers knows these layouts and renames the tensors (`from_single_file`). The file holds tensors
only. Sizes, scheduler and tokenizers come from the folder of a pipeline of the same kind.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from stepquant.checkpoint.folder import (
    DIFFUSERS_ERRORS,
    HUB_ID,
    INDEX_NAME,
    PICKLE_SUFFIXES,
    check_weight_file,
    check_weights,
    first_line,
    read_index,
)
from stepquant.support.errors import StepQuantError

if TYPE_CHECKING:  # slow to import; load_single_file imports it
    import torch
    from diffusers import DiffusionPipeline

CONFIG_FILES = ["*.json", "*.txt", "*.model", "**/*.json", "**/*.txt", "**/*.model"]
REMEDY = "pass the folder of a pipeline of the same kind as config (--config)"


def load_single_file(
    file: Path, *, dtype: torch.dtype | None = None, config: str | os.PathLike[str] | None = None
) -> DiffusionPipeline:
    """Load the pipeline in `file`; everything that is not a tensor comes from `config`.

    Args:
        file: safetensors file with all tensors of a float pipeline.
        dtype: as in `load_pipeline`.
        config: folder or hub id of a pipeline of the same kind, whose weights are not read. None:
            diffusers recognizes the model by its tensors, and its config comes from the hub.

    Raises:
        StepQuantError: the file is a pickle, damaged or not a whole pipeline, the config cannot be
            fetched or does not fit, or diffusers loads no single files for this kind of pipeline.
    """
    import diffusers

    if file.suffix in PICKLE_SUFFIXES:
        raise StepQuantError(
            f"'{file}' is a pickle: pickle files are refused because loading one can run any code; "
            "expected the checkpoint as safetensors"
        )
    check_weight_file(file)
    folder = _config_folder(file, config)
    index = read_index(folder / INDEX_NAME)
    kind = getattr(diffusers, str(index["_class_name"]), None)
    if kind is None or not hasattr(kind, "from_single_file"):
        raise StepQuantError(
            f"the config '{folder}' of '{file}' is of {index['_class_name']}, which diffusers does "
            "not load from single files: expected the config of another kind, or a model folder"
        )
    for name in index:
        if (folder / name).is_dir():
            check_weights(folder / name)
    try:
        pipeline = kind.from_single_file(
            str(file), config=str(folder), dtype=dtype, local_files_only=True
        )
    except (*DIFFUSERS_ERRORS, _component_error()) as error:
        # torch raises NotImplementedError for parameters without data.
        lacks = isinstance(error, NotImplementedError)
        reason = "it lacks tensors of one of its parts" if lacks else first_line(error)
        raise StepQuantError(
            f"'{file}' cannot be loaded as the {kind.__name__} of the config '{folder}' "
            f"({reason}): expected a file with all parts of the pipeline, and a config of its kind"
        ) from error
    return pipeline


def _config_folder(file: Path, config: str | os.PathLike[str] | None) -> Path:
    """Return a local folder with the configuration for `file`.

    Raises:
        StepQuantError: there is no such folder, or it cannot be fetched from the hub.
    """
    if config is None:
        source = _usual_config(file)
        wanted = f"'{file}' is taken for a model like '{source}'"
    else:
        source = str(config)
        folder = Path(source).expanduser()
        if folder.is_dir():
            if not (folder / INDEX_NAME).is_file():
                raise StepQuantError(
                    f"the config '{folder}' of '{file}' holds no {INDEX_NAME}: expected the folder "
                    "of a diffusers pipeline, with or without its weights"
                )
            return folder
        wanted = f"the config of '{file}' is '{source}', which is no local folder"
        if not HUB_ID.fullmatch(source):
            raise StepQuantError(
                f"{wanted}: expected the folder of a diffusers pipeline, or a hub id like "
                "'org/name'"
            )
    try:
        return Path(snapshot_download(source, allow_patterns=CONFIG_FILES))
    except (OSError, ValueError) as error:
        raise StepQuantError(
            f"{wanted}, and the configuration of that name could not be fetched from the hub "
            f"({first_line(error)}): check the network, or {REMEDY}"
        ) from error


def _usual_config(file: Path) -> str:
    """Return the hub id of the model that diffusers recognizes in `file`.

    diffusers goes by the names and shapes of the tensors.

    Raises:
        StepQuantError: the file cannot be read, or diffusers does not recognize it.
    """
    from diffusers.loaders.single_file_utils import (
        CHECKPOINT_KEY_NAMES,
        DIFFUSERS_DEFAULT_PIPELINE_PATHS,
        infer_diffusers_model_type,
        load_single_file_checkpoint,
    )

    try:
        tensors = load_single_file_checkpoint(str(file))
        kind = infer_diffusers_model_type(tensors)
    except (*DIFFUSERS_ERRORS, SafetensorError) as error:
        raise StepQuantError(
            f"'{file}' cannot be read as a model ({first_line(error)}): expected the tensors of a "
            f"whole pipeline; {REMEDY}"
        ) from error
    # diffusers returns "v1" for files in which it recognizes no name.
    if kind == "v1" and CHECKPOINT_KEY_NAMES["v1"] not in tensors:
        raise StepQuantError(
            f"'{file}' has tensor names like '{next(iter(tensors), 'none')}', which diffusers does "
            f"not recognize: expected a whole pipeline in one file; {REMEDY}"
        )
    return str(DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])


def _component_error() -> Any:
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    return SingleFileComponentError
