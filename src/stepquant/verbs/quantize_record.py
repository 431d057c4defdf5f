"""The record that `quantize` returns."""

from __future__ import annotations

from typing import Any

from torch import nn

from stepquant.methods.session import Session
from stepquant.pipelines.opening import float32_bytes
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.support.process_memory import as_mb, peak_memory_mb
from stepquant.verbs.quantize_job import Job


def record_of(
    job: Job,
    session: Session,
    packed: nn.Module,
    components: dict[str, dict[str, Any]],
    seconds: float,
    resumed: bool,
) -> dict[str, Any]:
    """Return recipe, bits, bytes, time, memory and the summary of each step, as JSON values."""
    sites = job.adapter.attention_sites(job.float_model)
    return {
        "recipe": job.recipe.to_dict(),
        "bits": job.recipe.scheme.label,
        "protocol": job.recipe.scheme.protocol,
        "mean_weight_bits": mean_weight_bits(packed),
        "float32_bytes": float32_bytes(job.float_model),
        "seconds": round(seconds, 2),
        "resumed": resumed,  # if so, seconds and peak memory cover only the last run
        "predicted_peak_memory_mb": as_mb(job.memory.prediction.peak),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "left_float": job.left_float,
        "attention_float": [name for name in sites if name not in session.attention()],
        "reference_layers": reference_layers(packed),
        "components": components,
        "summary": session.summary,
        "provenance": job.provenance,
    }


def mean_weight_bits(model: nn.Module) -> float:
    """Return the mean bits per quantized weight of all packed layers."""
    layers = [module for module in model.modules() if isinstance(module, IntegerLayer)]
    weights = sum(layer.spec.columns * layer.spec.out_channels for layer in layers)
    return sum(
        layer.spec.columns * layer.spec.out_channels * layer.spec.mean_weight_bits
        for layer in layers
    ) / max(1, weights)


def reference_layers(model: nn.Module) -> dict[str, str]:
    """Return the reasons by name of the packed layers that no fast kernel takes on this device."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, IntegerLayer) and module.fallback_reasons():
            found[name] = "; ".join(module.fallback_reasons())
    return found
