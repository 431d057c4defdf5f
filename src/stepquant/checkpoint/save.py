"""Atomic writing of a pipeline with a packed denoiser as a diffusers folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from torch import nn

from stepquant.checkpoint.architecture import architecture_of
from stepquant.checkpoint.attention_config import AttentionConfig
from stepquant.checkpoint.config import StepQuantConfig
from stepquant.checkpoint.file_sums import write_sums
from stepquant.checkpoint.layer_config import LayerConfig
from stepquant.checkpoint.module import write_module
from stepquant.checkpoint.plugin import StepQuantQuantizer
from stepquant.checkpoint.quantized_model import adapt_methods
from stepquant.checkpoint.rebuild import why_not_rebuilt
from stepquant.checkpoint.validate import (
    STEP_GRID_NAME,
    check_model,
    packed_attention,
    packed_layers,
    packed_modules,
)
from stepquant.models.attention_processor import PRODUCTS
from stepquant.models.input_bypass import bypass_of
from stepquant.models.rewriting import names_of_rewritten
from stepquant.quantizers import StepContext
from stepquant.support.atomic import atomic_folder, user_path
from stepquant.support.errors import StepQuantError


def describe_layers(model: nn.Module) -> dict[str, LayerConfig]:
    """Return the config of each packed layer of `model`, by name."""
    return {name: LayerConfig.of(layer) for name, layer in packed_layers(model).items()}


def describe_attention(model: nn.Module) -> dict[str, AttentionConfig]:
    """Return the config of each attention of `model` with packed products, by name."""
    return {
        name.removesuffix(PRODUCTS): AttentionConfig.of(products)
        for name, products in packed_attention(model).items()
    }


def attach_config(model: Any, config: StepQuantConfig) -> Any:
    """Attach `config` to the packed `model` so that it can be saved, and return `model`.

    Afterwards `save_pretrained` of a diffusers `ModelMixin` writes a checkpoint; `save_pipeline`
    does so for other modules. The function sets `layers`, `attention`, `steps`,
    `input_error_bypass`, `architecture` and `rewritten_layers` of `config` from the model. The
    caller sets the rest. The model's step context must be attached already (`StepContext.attach`).
    From here on diffusers treats the model as quantized: it moves between devices, but not to
    another dtype.

    Raises:
        StepQuantError: `model` has no packed layer, layers of several step contexts, or tensors
            that a load would refuse.
    """
    grid = _shared_context(model).grid
    config.layers, config.steps = describe_layers(model), len(grid)
    config.attention = describe_attention(model)
    bypass = bypass_of(model)
    config.input_error_bypass = None if bypass is None else bypass.layer
    config.architecture = architecture_of(model)
    config.rewritten_layers = names_of_rewritten(model)
    StepQuantConfig.from_dict(config.to_dict())  # the check that a load makes
    device = next(model.buffers()).device
    model.register_buffer(STEP_GRID_NAME, grid.timesteps.clone().to(device))
    check_model(model)
    quantizer = StepQuantQuantizer(config)
    quantizer.saved_names, quantizer.saved_model = frozenset(model.state_dict()), model
    quantizer.why_not_saved = why_not_rebuilt(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    adapt_methods(model, other_dtypes=False)
    model.quantization_method = config.quant_method
    if hasattr(model, "register_to_config"):
        model.register_to_config(quantization_config=config)
    return model


def save_pipeline(
    pipeline: Any,
    component_name: str,
    folder: str | os.PathLike[str],
    before: Callable[[Path], object] | None = None,
) -> Path:
    """Write `pipeline`, whose component `component_name` is packed, to the new `folder`.

    Returns the path of the folder. `before` is called with the complete folder before it gets its
    name. If the component is not a diffusers model, or the pipeline is a
    `DenoiserPipeline`, only that component is written; see `checkpoint.module`.

    The function writes to a hidden folder beside `folder`, flushes it to the disk and renames it,
    so that `folder` is either complete or absent. Equal pipelines give equal bytes.

    Raises:
        StepQuantError: `folder` exists, `attach_config` was not called on the component, the
            component has tensors that a load would refuse, or the disk is full or refuses the
            write.
    """
    folder = user_path(os.fspath(folder))
    component: Any = getattr(pipeline, component_name, None)
    if not isinstance(getattr(component, "hf_quantizer", None), StepQuantQuantizer):
        raise StepQuantError(
            f"component '{component_name}' of {type(pipeline).__name__} is "
            f"{type(component).__name__} without a stepquant config: expected a packed denoiser; "
            "call attach_config on it first"
        )
    check_model(component)
    with new_checkpoint(folder, before=before) as partial:
        # diffusers could not load the folder of a pipeline that only the user's code can build.
        if getattr(pipeline, "saves_denoiser_only", False) or not isinstance(component, ModelMixin):
            write_module(component, partial)
        else:
            pipeline.save_pretrained(partial, safe_serialization=True)
    return folder


@contextmanager
def new_checkpoint(
    folder: Path,
    modes: Mapping[str, int] | None = None,
    before: Callable[[Path], object] | None = None,
) -> Iterator[Path]:
    """Yield a hidden folder to write a pipeline to; it becomes `folder` at the end.

    The folder gets the digests of its files (`checkpoint.file_sums`). `modes` is as in
    `atomic_folder`, `before` as in `save_pipeline`. See `atomic_folder` for the errors.
    """
    with atomic_folder(folder, modes) as partial:
        yield partial
        _forget_origin(partial)
        write_sums(partial)
        if before is not None:
            before(partial)


def _shared_context(model: nn.Module) -> StepContext:
    contexts = {id(layer.context): layer.context for layer in packed_modules(model).values()}
    if len(contexts) != 1:
        found = "layers of several step contexts" if contexts else "no packed layer"
        raise StepQuantError(
            f"{type(model).__name__} has {found}: expected packed layers "
            "(simulation.packing.pack_model) that share one step context"
        )
    return next(iter(contexts.values()))


def _forget_origin(folder: Path) -> None:
    """Drop the path that each component was loaded from: it differs between equal checkpoints."""
    for path in folder.rglob("*.json"):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            continue  # a file that lay in the folder and is of no component
        if isinstance(values, dict) and values.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
