"""Provenance of a checkpoint: how it was made."""

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
    """Return seed, sampler, conditions, versions and threads; equal for two equal runs."""
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
    """Return the versions of the packages, other than stepquant, that provide steps of `recipe`.

    The result depends on them just as on the version of stepquant.
    """
    packages = {STEPS.package(step.name) for step in recipe.steps}
    return dict(sorted(package for package in packages if package is not None))
