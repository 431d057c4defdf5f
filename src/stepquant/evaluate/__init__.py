"""Quality and latency of a model.

The names below are loaded when they are first used: `import stepquant.evaluate` itself is cheap,
and torchmetrics, of the `[evaluate]` extra, is imported by the first metric that is computed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepquant.evaluate.feature_network import FeatureNetwork, frechet_metric
    from stepquant.evaluate.features import FeatureExtractor, load_features
    from stepquant.evaluate.latency import Timing, measure_latency, ratios
    from stepquant.evaluate.metrics import (
        StepError,
        frechet_distance,
        frechet_distance_interval,
        noise_prediction_error,
        paired_psnr,
        paired_ssim,
    )

__all__ = [
    "FeatureExtractor",
    "FeatureNetwork",
    "StepError",
    "Timing",
    "frechet_distance",
    "frechet_distance_interval",
    "frechet_metric",
    "load_features",
    "measure_latency",
    "noise_prediction_error",
    "paired_psnr",
    "paired_ssim",
    "ratios",
]

_FILES = {
    "FeatureNetwork": "feature_network",
    "frechet_metric": "feature_network",
    "FeatureExtractor": "features",
    "load_features": "features",
    "Timing": "latency",
    "measure_latency": "latency",
    "ratios": "latency",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_FILES.get(name, 'metrics')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
