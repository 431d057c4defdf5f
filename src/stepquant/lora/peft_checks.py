"""Checks of peft adapters for quantized layers, made before peft changes the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from stepquant.lora.peft_layers import FUSING, QUANTIZED
from stepquant.lora.scaled_layers import scaled_layers
from stepquant.runtime.layers.adapters import adapted_layer, without_adapter
from stepquant.support.errors import StepQuantError

STARTS = (True, False, "gaussian", "orthogonal")  # that do not read the layer's weight


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The quantized layers of `model` by name; layers with adapters have the name of the whole."""
    layers = {name: without_adapter(module) for name, module in model.named_modules()}
    return {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, QUANTIZED) and not name.endswith(".base_layer")
    }


def check_adapter(
    tuner: Any, model: nn.Module, name: str, tensors: Mapping[str, Any] | None
) -> None:
    """Check that the adapter `name`, whose config `tuner` holds, fits its quantized layers.

    `tensors`: the adapter's tensors by name, which choose the layers; None if the config does.

    Raises:
        StepQuantError: the adapter is more than a plain LoRA, starts from the float weights, or is
            for a layer that is offloaded or that the recipe scaled by folding.
    """
    config, layers = tuner.peft_config[name], quantized_layers(model)
    if tensors is None:
        # The shorthand for all linear layers: peft resolves it later.
        every = config.target_modules == "all-linear"
        wanted = {key for key in layers if every or tuner._check_target_module_exists(config, key)}
    else:
        names = {key.rsplit(f".{tuner.prefix}", 1)[0].removeprefix("_orig_mod.") for key in tensors}
        wanted = layers.keys() & names
    if not wanted:
        return
    first, what = min(wanted), f"the adapter '{name}'"
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise StepQuantError(
            f"{what} is of peft's kind {kind} and is for the quantized layer '{first}': expected "
            "a plain LoRA; load other adapters into the float pipeline, fuse them and quantize that"
        )
    for setting in _unsupported(config):
        raise StepQuantError(
            f"{what} has the setting {setting}={getattr(config, setting)!r} and is for the "
            f"quantized layer '{first}': expected a plain LoRA, of two matrices for each layer; "
            "load others into the float pipeline, fuse them and quantize that"
        )
    if config.init_lora_weights not in STARTS:
        raise StepQuantError(
            f"{what} has the setting init_lora_weights={config.init_lora_weights!r}, which reads "
            f"and changes the float weight of the layer '{first}', which is quantized: expected "
            f"one of {', '.join(map(repr, STARTS))}"
        )
    scaled = scaled_layers(model)
    for key in sorted(wanted):
        layer = layers[key]
        if any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
            raise StepQuantError(
                f"the layer '{key}' has its tensors offloaded: expected them in memory; load the "
                "LoRA through the pipeline, or before offloading"
            )
        if key in scaled:
            raise StepQuantError(
                f"{what} is for the layer '{key}', whose input or output the recipe's step "
                f"'{scaled[key]}' rescaled by folding: expected a checkpoint without folded "
                f"scalings; quantize again with --set {scaled[key]}.fold=false"
            )


def check_not_fused(model: nn.Module) -> None:
    """Check that no quantized layer of `model` has an adapter, which fusing would add to it.

    Raises:
        StepQuantError: a quantized layer has one.
    """
    for name, module in model.named_modules():
        layer = adapted_layer(module)
        if isinstance(layer, QUANTIZED):
            raise StepQuantError(f"the layer '{name}' {FUSING}")


def _unsupported(config: Any) -> list[str]:
    """The settings of a LoRA's config that make it more than two matrices for each layer."""
    names = [
        field.name
        for field in dataclasses.fields(config)
        if field.metadata.get("is_lora_variant") or field.name in ("use_dora", "target_parameters")
    ]
    return [name for name in names if getattr(config, name)]
