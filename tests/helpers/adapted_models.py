"""Every kind of quantized denoiser, with its control: a float model that computes the same."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from architectures import ARCHITECTURES, build
from stepquant.api import DynamicConfig, WeightOnlyConfig, quantize
from stepquant.runtime.layers.weight_only import WeightOnly
from stepquant.weight_only.model import put_layers, resolved_at_load
from stepquant.weight_only.quantizers import mark_weight_only

STEPS = 3
FEW = {"calibration.trajectories": 2, "ranges.weights": "minmax", "ranges.activations": "minmax"}
CONFIGS: dict[str, Any] = {
    "w8": WeightOnlyConfig,
    "w4": functools.partial(WeightOnlyConfig, bits=4),
    "dynamic": DynamicConfig,
}
PACKED = {"w8a8": 8, "w4a4": 4}
KINDS = (*CONFIGS, *PACKED)


def quantized(name: str, kind: str) -> DiffusionPipeline:
    """The tiny pipeline `name` with a denoiser of this kind."""
    architecture = ARCHITECTURES[name]
    if kind in PACKED:
        bits = PACKED[kind]
        result = quantize(
            build(name), "minmax", bits, bits, None, STEPS, FEW, **architecture.arguments
        )
        return result.pipeline
    pipeline = build(name)
    model = getattr(pipeline, architecture.component)
    weight_only(model, CONFIGS[kind]())
    return pipeline


def weight_only(model: Any, config: Any) -> None:
    """Quantize `model` in place, as loading it with `config` does."""
    config = resolved_at_load(config, model)
    mark_weight_only(model, config, "the model")
    put_layers(model, config)


def dequantized(model: nn.Module) -> nn.Module:
    """`model`, in which float layers with the same weights replace weight-only layers."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, WeightOnly):
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, float_layer(layer))
    return model


def float_layer(layer: Any) -> nn.Module:
    """The float layer with the dequantized weight of a weight-only `layer`."""
    if isinstance(layer, nn.Linear):
        new: Any = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    else:
        new = nn.Conv2d(
            *(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride),
            *(layer.padding, layer.dilation, layer.groups, layer.bias is not None),
        )
    with torch.no_grad():
        new.weight.copy_(layer.float_weight(torch.float32))
        if layer.bias is not None:
            new.bias.copy_(layer.bias)
    return new.requires_grad_(False).eval()
