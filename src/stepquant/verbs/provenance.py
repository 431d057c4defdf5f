"""What a run of `quantize` and its checkpoint say of their making."""

from __future__ import annotations

import copy
from importlib.metadata import version
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepquant.methods.recipe import Calibration
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.sampling import set_scheduler
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.support.version import __version__


def provenance_of(
    seed: int, pipeline: DiffusionPipeline, calibration: Calibration, conditioning: Conditioning
) -> dict[str, Any]:
    """What a checkpoint says of its making; nothing that differs between two equal runs."""
    packages = ("torch", "diffusers", "numpy")
    sampler = copy.copy(pipeline)
    set_scheduler(sampler, calibration.scheduler)
    conditions = conditioning.describe()
    return {
        **({"conditioning": conditions} if conditions else {}),
        "seed": seed,
        "sampler": f"{type(sampler.scheduler).__name__}, {calibration.steps} steps",
        "pipeline": type(pipeline).__name__,
        "versions": {"stepquant": __version__, **{name: version(name) for name in packages}},
        "threads": torch.get_num_threads(),
    }


def mean_weight_bits(model: nn.Module) -> float:
    """Bits per quantized weight, over all packed layers."""
    layers = [module for module in model.modules() if isinstance(module, IntegerLayer)]
    weights = sum(layer.spec.columns * layer.spec.out_channels for layer in layers)
    return sum(
        layer.spec.columns * layer.spec.out_channels * layer.spec.mean_weight_bits
        for layer in layers
    ) / max(1, weights)


def reference_layers(model: nn.Module) -> dict[str, str]:
    """Packed layers that no fast kernel takes on this device, with the reasons."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, IntegerLayer) and module.fallback_reasons():
            found[name] = "; ".join(module.fallback_reasons())
    return found
