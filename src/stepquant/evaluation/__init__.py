"""Quality and latency of a model.

`import stepquant.evaluation` is cheap: each public name is imported at its first use, and the first
metric that is computed imports torchmetrics, which the `[evaluate]` extra installs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepquant.evaluation.feature_network import FeatureNetwork, frechet_metric
    from stepquant.evaluation.features import FeatureExtractor, load_features
    from stepquant.evaluation.latency import (
        Timing,
        measure_latency,
        ratios,
    )
    from stepquant.evaluation.metric import Comparison, Metric, register_metric
    from stepquant.evaluation.metrics.frechet import (
        frechet_distance,
        frechet_distance_interval,
    )
    from stepquant.evaluation.metrics.noise_error import StepError, noise_prediction_error
    from stepquant.evaluation.metrics.paired import paired_psnr, paired_ssim

__all__ = [
    "Comparison",
    "FeatureExtractor",
    "FeatureNetwork",
    "Metric",
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
    "register_metric",
]

_FILES = {
    "FeatureNetwork": "feature_network",
    "frechet_metric": "feature_network",
    "FeatureExtractor": "features",
    "load_features": "features",
    "Timing": "latency",
    "measure_latency": "latency",
    "ratios": "latency",
    "Comparison": "metric",
    "Metric": "metric",
    "register_metric": "metric",
    "frechet_distance": "metrics.frechet",
    "frechet_distance_interval": "metrics.frechet",
    "StepError": "metrics.noise_error",
    "noise_prediction_error": "metrics.noise_error",
    "paired_psnr": "metrics.paired",
    "paired_ssim": "metrics.paired",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
