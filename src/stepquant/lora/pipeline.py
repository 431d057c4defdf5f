"""Loading, scaling and unloading of LoRAs, as float branches beside a pipeline's layers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepquant.lora.files import read_lora_file
from stepquant.lora.keys import lora_layers, models_of
from stepquant.lora.scaled_layers import scaled_layers
from stepquant.pipelines.resolved import ResolvedPipeline
from stepquant.runtime.layers.adapters import adapters_text, named_adapters
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.lora_branch import (
    LoraBranch,
    attach_branch,
    detach_branch,
    named_branches,
)
from stepquant.support.errors import StepQuantError

NAME = re.compile(r"\w[\w-]*")


def load_lora(
    pipeline: DiffusionPipeline,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    scale: float = 1.0,
    name: str = "default",
    weight_name: str | None = None,
) -> list[str]:
    """Load a LoRA, which adds `scale * factor * B(A(x))` to the layers that it was trained for.

    Here `factor` is the LoRA's own, such as `alpha / r`. Packed layers keep their weights: they
    compute the branch in float32 from their float input. Layers of text encoders get their
    branches, too. Several LoRAs can be loaded at once. Saving writes the model without LoRAs.

    Args:
        pipeline: pipeline with a packed denoiser, or a float one to compare with.
        source: safetensors file of diffusers, peft or kohya's trainer, a folder with one, a hub id,
            or tensors by name.
        scale: factor of the branches, which `set_lora_scales` can change; finite.
        name: name of the LoRA for `unload_lora` and `set_lora_scales`.
        weight_name: file to load from a folder or hub repository with several.

    Returns:
        The names of the layers, each with its component in front.

    Raises:
        StepQuantError: the LoRA does not fit the pipeline, or is for layers whose inputs or outputs
            the recipe has scaled in neighbouring layers. The message names the key or the layer,
            and the pipeline is unchanged.
    """
    component = ResolvedPipeline.of(pipeline).name
    denoiser = models_of(pipeline)[component]
    _check_scale(scale)
    if NAME.fullmatch(name) is None:
        raise StepQuantError(
            f"the name of a LoRA is '{name}': expected letters, digits, '_' and '-'"
        )
    if name in lora_scales(pipeline):
        raise StepQuantError(
            f"a LoRA called '{name}' is loaded already: expected an unused name; unload that LoRA "
            "first, or choose another name"
        )
    file = read_lora_file(source, weight_name)
    layers = lora_layers(file, pipeline, component)
    scaled = {} if hasattr(type(pipeline), "make_adapter") else scaled_layers(denoiser)
    for (part, layer_name), (layer, _) in layers.items():
        _check_ready(file.label, pipeline, part, layer_name, layer)
        if part == component and layer_name in scaled:
            step = scaled[layer_name]
            raise StepQuantError(
                f"{file.label} is for the layer '{layer_name}', whose input or output the recipe's "
                f"step '{step}' rescaled by folding: expected a checkpoint without folded "
                f"scalings; quantize again with --set {step}.fold=false"
            )
    for layer, weights in layers.values():
        A, B = (matrix.detach().float().clone() for matrix in (weights.A, weights.B))
        attach_branch(layer, name, LoraBranch(A, B, weights.factor, float(scale)))
    return [f"{part}.{layer_name}" for part, layer_name in layers]


def unload_lora(pipeline: DiffusionPipeline, name: str | None = None) -> list[str]:
    """Remove the LoRA `name`, or all of them if it is None; return the names of those removed.

    Afterwards the model is bit for bit the same as before loading.

    Raises:
        StepQuantError: `name` is not loaded.
    """
    if name is not None:
        _check_loaded(pipeline, name)
    found = []
    for _, layer, lora, _ in _branches(pipeline):
        if name in (None, lora):
            detach_branch(layer, lora)  # type: ignore[arg-type]
            found.append(lora)
    return list(dict.fromkeys(found))


def set_lora_scales(pipeline: DiffusionPipeline, scales: Mapping[str, float]) -> None:
    """Set the scales of loaded LoRAs by name; LoRAs that are not named keep theirs.

    The branches of a LoRA with scale 0 are not computed.

    Raises:
        StepQuantError: a name is not loaded, or a scale is not a finite number.
    """
    for name, scale in scales.items():
        _check_loaded(pipeline, name)
        _check_scale(scale)
    for _, _, lora, branch in _branches(pipeline):
        if lora in scales:
            branch.scale = float(scales[lora])


def lora_scales(pipeline: DiffusionPipeline) -> dict[str, float]:
    """Return the scale of each loaded LoRA, by name."""
    return {lora: branch.scale for _, _, lora, branch in _branches(pipeline)}


def check_no_lora(pipeline: DiffusionPipeline) -> None:
    """Check that no LoRA is loaded, by stepquant or by peft.

    Calibration would include its effect, and the packed model would not.

    Raises:
        StepQuantError: a LoRA is loaded.
    """
    for lora in lora_scales(pipeline):
        raise StepQuantError(
            f"the {type(pipeline).__name__} has the LoRA '{lora}' loaded: expected none; call "
            "unload_lora first, and load the LoRA into the quantized pipeline"
        )
    for component, model in models_of(pipeline).items():
        for layer, adapters in named_adapters(model):
            raise StepQuantError(
                f"the layer '{component}.{layer}' has {adapters_text(adapters)} of peft: expected "
                "none; call unload_lora_weights first, and fuse_lora before that to quantize the "
                "model with the LoRA in it"
            )


def _branches(pipeline: DiffusionPipeline) -> list[tuple[str, nn.Module, str, LoraBranch]]:
    return [found for model in models_of(pipeline).values() for found in named_branches(model)]


def _check_loaded(pipeline: DiffusionPipeline, name: str) -> None:
    loaded = list(lora_scales(pipeline))
    if name not in loaded:
        raise StepQuantError(
            f"no LoRA called '{name}' is loaded: expected one of {', '.join(loaded) or 'none'}"
        )


def _check_scale(scale: float) -> None:
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or not abs(scale) < float("inf"):
        raise StepQuantError(f"the scale of a LoRA is {scale!r}: expected a finite number")


def _check_ready(
    label: str, pipeline: DiffusionPipeline, component: str, name: str, layer: nn.Module
) -> None:
    """Check that a branch can be attached to the layer in its current state, and will run.

    Raises:
        StepQuantError: the layer is offloaded, or is a float layer of a compiled model.
    """
    if any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
        raise StepQuantError(
            f"the layer '{name}' of {component} has its tensors offloaded: expected them in "
            "memory; load the LoRA before enable_sequential_cpu_offload"
        )
    model = getattr(pipeline, component)
    compiled = hasattr(model, "_orig_mod") or model._compiled_call_impl is not None
    if compiled and not isinstance(layer, IntegerLayer):
        # A compiled graph ignores hooks that are added later.
        raise StepQuantError(
            f"{label} is for the layer '{name}' of {component}, which is float and compiled "
            "already: expected it uncompiled; load the LoRA before torch.compile"
        )
