"""How a checkpoint was made, as it says itself."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

from stepquant.methods.recipe import Calibration, Recipe
from stepquant.methods.step import STEPS
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.resolved import ResolvedPipeline
from stepquant.support.version import __version__


def provenance_of(
    seed: int, sampler: ResolvedPipeline, calibration: Calibration, conditioning: Conditioning
) -> dict[str, Any]:
    """Seed, sampler, conditions and versions. Two equal runs get equal values."""
    packages = ("torch", "diffusers", "numpy")
    conditions = conditioning.describe()
    return {
        **({"conditioning": conditions} if conditions else {}),
        "seed": seed,
        "sampler": f"{type(sampler.pipeline.scheduler).__name__}, {calibration.steps} steps",
        "pipeline": sampler.kind,
        "versions": {"stepquant": __version__, **{name: version(name) for name in packages}},
        "threads": torch.get_num_threads(),
    }


def plug_ins_of(recipe: Recipe) -> dict[str, str]:
    """The installed packages other than stepquant whose steps `recipe` has, each with its version.

    They decide the result as stepquant's own version does.
    """
    packages = {STEPS.package(step.name) for step in recipe.steps}
    return dict(sorted(package for package in packages if package is not None))
