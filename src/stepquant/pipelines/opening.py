"""Opening of models by name: `builtin:NAME`, a local diffusers folder or file, or a hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepquant.checkpoint.load import is_single_file, load_pipeline, local_folder
from stepquant.models.mapped import FloatState, open_mapped
from stepquant.models.weight_files import WeightFiles
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.resolved import DENOISERS, denoiser_of
from stepquant.support.errors import StepQuantError

BUILTIN = "builtin:"
MAP_FROM = 200_000_000  # parameters; smaller models are loaded into memory
BUILTIN_FEATURES = {
    f"{data}-{kind}": data for data in ("fashion", "cifar10") for kind in ("ddpm", "dit", "t2i")
}
CONDITIONS = "conditions.json"  # in the folder of each embedded model with conditions


@dataclass(frozen=True)
class EmbeddedConditions:
    """Conditions that an embedded model was trained for: prompts or labels of its classes.

    `classes` holds the class of each prompt or label in `conditioning`, in the same order. Both are
    empty for a model without conditions.
    """

    conditioning: Conditioning = field(default_factory=Conditioning)
    classes: tuple[int, ...] = ()

    def classes_of(self, num: int) -> tuple[int, ...]:
        """Return the classes of images 0 to `num - 1`; the model must have conditions."""
        return tuple(self.classes[i % len(self.classes)] for i in range(num))


def builtin_names() -> list[str]:
    """Return the names of the embedded pipelines, sorted."""
    folder = resources.files("stepquant") / "assets"
    return sorted(
        entry.name for entry in folder.iterdir() if (entry / "model_index.json").is_file()
    )


def builtin_path(name: str) -> Path:
    """Return the diffusers folder of the embedded pipeline `name`.

    Raises:
        StepQuantError: there is no embedded pipeline of that name.
    """
    if name not in builtin_names():
        raise StepQuantError(
            f"unknown embedded model '{BUILTIN}{name}': expected one of "
            f"{', '.join(BUILTIN + known for known in builtin_names())}"
        )
    return Path(str(resources.files("stepquant") / "assets" / name))


def resolve_builtin(model: str | Path) -> str:
    """Return the folder of the embedded pipeline that `model` names, or `model` itself as text.

    Raises:
        StepQuantError: `model` is `builtin:NAME` with an unknown name.
    """
    text = str(model)
    return str(builtin_path(text.removeprefix(BUILTIN))) if text.startswith(BUILTIN) else text


def open_pipeline(
    model: str | Path | DiffusionPipeline,
    device: str | torch.device = "cpu",
    config: str | Path | None = None,
    map_large: bool = False,
) -> DiffusionPipeline:
    """Open the pipeline that `model` names, in float32 and ready to sample.

    Args:
        model: "builtin:NAME", a local diffusers folder, a hub id, a safetensors file with a float
            pipeline in the layout of its original trainer, or a pipeline, which is returned as it
            is.
        device: device of the pipeline.
        config: for a single file, the folder or hub id of a pipeline of the same kind, which has
            the sizes, the scheduler and the tokenizers. None: diffusers recognizes the model, and
            its config comes from the hub.
        map_large: leave the weights of a denoiser with more than `MAP_FROM` parameters in their
            files, on the CPU; see `models.mapped`. Single files are always loaded into memory.

    Raises:
        StepQuantError: the model cannot be found, fetched or loaded, or `config` is given for
            anything but a single file.
    """
    if isinstance(model, DiffusionPipeline):
        if config is not None:
            raise StepQuantError(
                f"the config '{config}' was given for an open {type(model).__name__}: expected no "
                "config, or the path of a single safetensors file as the model"
            )
        return model
    if not isinstance(model, str | Path):
        raise StepQuantError(
            f"the model is a {type(model).__name__}: expected a diffusers pipeline, a folder, a "
            f"file, a hub id or {BUILTIN}NAME; a denoiser alone has no sampler to calibrate with"
        )
    source = resolve_builtin(model)
    mapped = map_large and not is_single_file(source)
    parts = _mapped_denoiser(local_folder(source)) if mapped else {}
    pipeline = load_pipeline(source, dtype=torch.float32, config=config, parts=parts).to(device)
    denoiser = denoiser_of(pipeline).eval()
    denoiser.requires_grad_(False)
    return pipeline


def _mapped_denoiser(folder: Path) -> dict[str, nn.Module]:
    """Return the denoiser in `folder` by component name, mapped; empty if small or not mappable."""
    for name in DENOISERS:
        try:
            if WeightFiles(folder / name).parameters > MAP_FROM:
                return {name: open_mapped(folder / name, f"the component '{name}'")}
        except StepQuantError:
            pass  # absent, or with older tensor names; loading reports any real error
    return {}


def default_features(model: str | Path | DiffusionPipeline) -> str | None:
    """Return the feature network for evaluating an embedded model, or None for other models."""
    text = str(model)
    # A user's folder with the name of an embedded model is not that model.
    return BUILTIN_FEATURES.get(text.removeprefix(BUILTIN)) if text.startswith(BUILTIN) else None


def default_conditions(model: str | Path | DiffusionPipeline) -> EmbeddedConditions:
    """Return the conditions and guidance that an embedded model was trained for.

    For other models the result is empty.
    """
    text = str(model)
    if not text.startswith(BUILTIN):
        return EmbeddedConditions()
    file = builtin_path(text.removeprefix(BUILTIN)) / CONDITIONS
    if not file.is_file():
        return EmbeddedConditions()
    found = json.loads(file.read_text())
    conditioning = Conditioning.of(found.get("prompts"), found.get("labels"), found["guidance"])
    return EmbeddedConditions(conditioning, tuple(found["classes"]))


def weight_file_bytes(folder: Path, component: str) -> int:
    """Return the size of the safetensors files of `component` in a diffusers folder, in bytes."""
    return sum(file.stat().st_size for file in (folder / component).glob("*.safetensors"))


def float32_bytes(model: nn.Module) -> int:
    """Return the size of the model's parameters and buffers in float32, in bytes."""
    return 4 * sum(FloatState(model).sizes().values())


__all__ = [
    "EmbeddedConditions",
    "builtin_names",
    "builtin_path",
    "default_conditions",
    "default_features",
    "float32_bytes",
    "open_pipeline",
    "weight_file_bytes",
]
