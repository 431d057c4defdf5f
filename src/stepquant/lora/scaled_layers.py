"""The layers that a recipe has scaled by folding, which a LoRA for the float model does not fit."""

from __future__ import annotations

from typing import Any

from stepquant.methods import STEPS, Step
from stepquant.methods.equivalent_scaling import ScalingStep
from stepquant.models.adapter import ADAPTERS, adapter_for
from stepquant.runtime.layers.adapters import without_adapter
from stepquant.runtime.layers.integer import IntegerConv2d, is_packed


def scaled_layers(denoiser: Any) -> dict[str, str]:
    """Return the layers whose inputs or outputs a step of the recipe has scaled, with that step.

    Equivalent scaling divides the output of one layer and multiplies the weights of its consumers.
    A LoRA was trained on undivided values, and the checkpoint does not keep the factors. A denoiser
    of an unknown architecture was quantized with a `ModuleAdapter`, which folds nothing.
    """
    known = any(kind.__name__ in ADAPTERS for kind in type(denoiser).__mro__)
    if not known or not is_packed(denoiser):
        return {}
    adapter = adapter_for(denoiser)
    groups = [(producer, consumers) for producer, consumers in adapter.folds(denoiser)]
    groups += [(entry.linear, entry.consumers) for entry in adapter.modulations(denoiser)]
    layers = {name: without_adapter(module) for name, module in denoiser.named_modules()}
    found: dict[str, str] = {}
    for entry in denoiser.hf_quantizer.quantization_config.recipe.get("steps", []):
        for step, settings in entry.items():
            fold = settings.get("fold")  # suffices even if the step's package is not installed
            if fold is None:  # an older recipe, from before steps had `fold`, or no scaling step
                fold = issubclass(STEPS.get(step, Step), ScalingStep)
            if not fold:
                continue
            for producer, consumers in groups:
                convs = all(isinstance(layers[name], IntegerConv2d) for name in consumers)
                if convs or settings.get("layers") != "conv":
                    found.update({name: step for name in (producer, *consumers)})
    return found
