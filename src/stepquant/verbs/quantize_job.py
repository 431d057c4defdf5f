"""A run of `quantize`: everything that its result depends on, checked before it computes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from diffusers import DiffusionPipeline
from torch import nn

from stepquant.calibration.called_layers import never_called
from stepquant.calibration.spill import Spill
from stepquant.calibration.survey import adapter_of
from stepquant.calibration.trajectories import Trajectories, drawer, first_inputs
from stepquant.checkpoint.file_sums import file_digests
from stepquant.lora.pipeline import check_no_lora
from stepquant.methods.recipe import Recipe, WeightOnlyRecipe
from stepquant.methods.session import SAMPLES_PER_STEP, Session
from stepquant.models.adapter import DenoiserAdapter
from stepquant.models.rewriting import with_rewritten
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.opening import open_pipeline
from stepquant.pipelines.resolved import ResolvedPipeline
from stepquant.pipelines.sampling import needs_own_scheduler
from stepquant.quantizers import StepContext
from stepquant.simulation.simulate import check_finite_weights, float_products, simulate
from stepquant.support.atomic import check_new_folder, user_path
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter
from stepquant.support.work_folder import WorkFolder
from stepquant.verbs.fingerprints import model_fingerprint, pipeline_fingerprint
from stepquant.verbs.memory_plan import Plan, plan_memory
from stepquant.verbs.provenance import plug_ins_of, provenance_of
from stepquant.verbs.readiness import check_denoiser
from stepquant.weight_only.components import check_components

AnyRecipe = TypeVar("AnyRecipe", Recipe, WeightOnlyRecipe)


@dataclass(frozen=True)
class Job:
    """A float pipeline and how to quantize it.

    Fields not listed here are arguments of `quantize`.

    Attributes:
        source: the float pipeline.
        sampler: the same pipeline with the scheduler of the calibration.
        blocks: names of the denoiser's blocks.
        left_float: reasons by name of the layers that stay float.
        memory: predicted memory of the calibration.
        provenance: JSON values for the checkpoint.
    """

    source: ResolvedPipeline
    sampler: ResolvedPipeline
    adapter: DenoiserAdapter
    recipe: Recipe
    conditioning: Conditioning
    seed: int
    components: Mapping[str, str]
    blocks: list[str]
    left_float: dict[str, str]
    memory: Plan
    provenance: dict[str, Any]

    @property
    def float_model(self) -> nn.Module:
        """The float denoiser."""
        return self.source.denoiser

    def description(self) -> dict[str, Any]:
        """Return JSON values that are equal for equal jobs; they identify unfinished work."""
        return {
            "recipe": self.recipe.to_dict(),
            "provenance": self.provenance,
            "model": model_fingerprint(self.float_model),
            "pipeline": pipeline_fingerprint(self.source.pipeline, self.source.name),
            "scheduler": json.loads(self.sampler.pipeline.scheduler.to_json_string()),
            "blocks": self.blocks,
            "left_float": self.left_float,
            "skip_splits": self.adapter.skip_splits(self.float_model),
            # Shape of a sample, if the user's pipeline states it.
            "shape": getattr(self.source.pipeline, "shape", None),
        }


def with_settings(
    recipe: AnyRecipe,
    weights: int | None,
    activations: int | None,
    steps: int | None,
    settings: Mapping[str, Any] | None,
) -> AnyRecipe:
    """Return the recipe with the caller's bits, sampling steps and settings.

    Raises:
        StepQuantError: the recipe has no such setting, or does not accept a value.
    """
    overrides = dict(settings or {})
    if weights is not None:
        overrides["scheme.weight_bits"] = weights
    if activations is not None:
        overrides["scheme.activation_bits"] = activations
    if steps is not None:
        overrides["calibration.steps"] = steps
    return recipe.override(overrides)


def check_output(out: str | Path | None, resume: bool) -> Path | None:
    """Return the output folder, or None for no output.

    Raises:
        StepQuantError: `out` exists or is not the name of a folder.
    """
    if out is None:
        return None
    target = user_path(out)
    if target.name in ("", ".."):
        raise StepQuantError(f"output folder is '{out}': expected the name of a new folder")
    # A run killed after it renamed the finished checkpoint leaves both folders.
    if not (resume and work_path(target).exists()):
        check_new_folder(target)
    return target


def is_saved(target: Path | None, work: WorkFolder) -> bool:
    """Whether `target` is there and holds the finished result of the job in `work`.

    Raises StepQuantError where something else is there: the result would have no place.
    """
    if target is None or not os.path.lexists(target):
        return False
    if target.is_dir() and work.is_result(file_digests(target)):
        return True
    raise StepQuantError(
        f"output folder '{target}' exists and is not the result of the unfinished work in "
        f"'{work.path}': expected no such folder; move it away or delete it, and continue with "
        "--resume"
    )


def work_path(target: Path) -> Path:
    """Return the folder for the unfinished work of `target`."""
    return target.with_name(target.name + ".work")


def open_float(
    model: str | Path | DiffusionPipeline,
    adapter: DenoiserAdapter | None,
    components: Mapping[str, str],
    kept: Iterable[str],
    reporter: Reporter,
) -> ResolvedPipeline:
    """Open the float pipeline `model`, rewrite layers for the kernels, and find its adapter.

    `kept`: patterns of modules that stay as they are.

    Raises:
        StepQuantError: the denoiser or one of `components` cannot be quantized.
    """
    source = ResolvedPipeline.of(open_pipeline(model, map_large=True, reporter=reporter))
    source = source.uncompiled()  # steps look at layers and change them
    check_no_lora(source.pipeline)
    check_components(source.pipeline, source.name, components)
    check_denoiser(source.denoiser, f"{source.name} of '{source.kind}'")
    rewritten = with_rewritten(source.denoiser, kept)
    if rewritten is not source.denoiser:
        source = source.with_denoiser(rewritten)
    source = replace(source, adapter=adapter)
    return replace(source, adapter=adapter_of(source))


def plan_job(
    source: ResolvedPipeline,
    recipe: Recipe,
    settings: Mapping[str, Any] | None,
    conditioning: Conditioning,
    seed: int,
    components: Mapping[str, str],
    memory: float | None,
    reporter: Reporter,
) -> Job:
    """Return the job for the arguments of `quantize`.

    Raises:
        StepQuantError: scheme, steps, sampler, weights or conditions contradict each other, or the
            calibration would not fit in memory.
    """
    model, adapter = source.denoiser, adapter_of(source)
    check_finite_weights(model)
    _, left_float = recipe.scheme.layer_bits(model, adapter)
    blocks = adapter.blocks(model)
    for step in recipe.steps:
        step.check(recipe.scheme)
    recipe, remark = with_own_scheduler(source.pipeline, recipe, settings)
    if remark is not None:
        reporter.line(remark)
    conditioning.check(source.pipeline)
    calibration = recipe.calibration
    sampler = source.with_scheduler(calibration.scheduler)
    for step in recipe.steps:
        step.check_model(model, adapter, sampler.pipeline.scheduler)
    plan = plan_memory(
        model,
        f"the {source.name} of {source.kind}",
        recipe,
        blocks,
        sampler.pipeline.scheduler,
        lambda: first_inputs(
            source.pipeline, calibration.steps, seed, calibration.scheduler, conditioning
        ),
        memory,
    )
    provenance = provenance_of(seed, sampler, calibration, conditioning)
    if components:
        provenance["components"] = dict(components)
    plug_ins = plug_ins_of(recipe)
    if plug_ins:
        provenance["plug_ins"] = plug_ins
    return Job(
        source,
        sampler,
        adapter,
        recipe,
        conditioning,
        seed,
        components,
        blocks,
        left_float,
        plan,
        provenance,
    )


def with_own_scheduler(
    pipeline: DiffusionPipeline, recipe: Recipe, settings: Mapping[str, Any] | None
) -> tuple[Recipe, str | None]:
    """Replace the recipe's default scheduler, ddim, by the pipeline's own if ddim does not apply.

    DDIM is for models that predict noise. A scheduler that the caller named is kept, and refused
    later.

    Returns:
        The recipe, and a remark for the user, or None if nothing changed.
    """
    key = "calibration.scheduler"
    asked = key in (settings or {}) or recipe.calibration.scheduler != "ddim"
    if asked or not needs_own_scheduler(pipeline):
        return recipe, None
    own = type(pipeline.scheduler).__name__
    return recipe.override({key: None}), (
        f"calibrating with the pipeline's own {own}: ddim is for models that predict noise"
    )


def without_uncalled(job: Job, trajectories: Trajectories) -> Job:
    """`job` with the layers that `trajectories` never reach among those that stay float."""
    uncalled = never_called(job.float_model, trajectories)
    new = {name: why for name, why in uncalled.items() if name not in job.left_float}
    return replace(job, left_float={**job.left_float, **new})


def begin_session(
    job: Job, trajectories: Trajectories, work: WorkFolder, reporter: Reporter
) -> Session:
    """Return a session with the simulation of the float model, ready for the recipe's steps."""
    recipe, calibration = job.recipe, job.recipe.calibration
    context = StepContext(trajectories.grid())
    simulation, left_float = simulate(
        job.float_model, job.adapter, recipe.scheme, context, job.left_float
    )
    for name, reason in left_float.items():
        reporter.line(f"layer '{name}' stays float: {reason}")
    if recipe.scheme.attention_bits is not None:
        for name, reason in float_products(job.float_model, job.adapter).items():
            reporter.line(f"the products of attention '{name}' stay float: {reason}")
    return Session(
        float_model=job.float_model,
        model=simulation,
        adapter=job.adapter,
        context=context,
        trajectories=trajectories,
        scheduler=job.sampler.scheduler(calibration.steps),
        draw=drawer(
            job.source.pipeline,
            calibration.steps,
            calibration.scheduler,
            job.conditioning,
            calibration.batch,
        ),
        weight_ranges=recipe.ranges.weights,
        activation_ranges=recipe.ranges.activations,
        seed=job.seed,
        reporter=reporter,
        work=work,
        spill=Spill(work.path or Path(tempfile.gettempdir()), job.memory.spilled_from),
        samples_per_step=min(SAMPLES_PER_STEP, calibration.batch),
    )
