"""The main job: a float pipeline in, a packed pipeline out."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from stepquant.calibration.observe import quant_layers
from stepquant.calibration.spill import Spill
from stepquant.calibration.survey import adapter_of
from stepquant.calibration.trajectories import drawer, first_inputs
from stepquant.checkpoint.config import StepQuantConfig
from stepquant.checkpoint.save import attach_config, save_pipeline
from stepquant.lora.pipeline import check_no_lora
from stepquant.methods.recipe import Recipe, load_recipe
from stepquant.methods.session import (
    SAMPLES_PER_STEP,
    Session,
    check_finite_weights,
    float_products,
    simulate,
)
from stepquant.models.adapter import DenoiserAdapter
from stepquant.models.mapped import FloatState
from stepquant.models.surgery import copy_around
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.opening import float32_bytes, open_pipeline, weight_file_bytes
from stepquant.pipelines.sampling import check_seed, clipping_remark, denoiser_name, set_scheduler
from stepquant.quantizers import StepContext
from stepquant.simulation.packing import pack_model
from stepquant.support.atomic import check_new_folder, remove_partial
from stepquant.support.errors import StepQuantError
from stepquant.support.process_memory import as_mb, peak_memory_mb, reset_peak_memory
from stepquant.support.progress import Reporter
from stepquant.support.work_folder import WorkFolder, fingerprint
from stepquant.verbs.calibration_inputs import (
    calibrated_scheduler,
    calibration_trajectories,
    with_own_scheduler,
)
from stepquant.verbs.memory_plan import plan_memory
from stepquant.verbs.provenance import (
    mean_weight_bits,
    plug_ins_of,
    provenance_of,
    reference_layers,
)
from stepquant.verbs.readiness import check_denoiser
from stepquant.weight_only.components import add_file_sizes, check_components, quantize_components


@dataclass
class Quantized:
    """What `quantize` gives: the packed pipeline, the simulation it was packed from, the record.

    `record` holds plain JSON values: recipe, bits, bytes, seconds, peak memory, and what each step
    reports.
    """

    pipeline: DiffusionPipeline
    simulation: nn.Module
    record: dict[str, Any]


def resolve_recipe(
    recipe: str | Path | Recipe,
    weights: int | None,
    activations: int | None,
    steps: int | None,
    settings: dict[str, Any] | None,
) -> Recipe:
    """The recipe with the caller's bits, sampler steps and settings."""
    overrides = dict(settings or {})
    if weights is not None:
        overrides["scheme.weight_bits"] = weights
    if activations is not None:
        overrides["scheme.activation_bits"] = activations
    if steps is not None:
        overrides["calibration.steps"] = steps
    return load_recipe(recipe).override(overrides)


def quantize(
    model: str | Path | DiffusionPipeline,
    recipe: str | Path | Recipe = "stepquant",
    weights: int | None = None,
    activations: int | None = None,
    out: str | Path | None = None,
    steps: int | None = None,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    resume: bool = False,
    reporter: Reporter | None = None,
    *,
    prompts: str | Sequence[str] | None = None,
    labels: int | Sequence[int] | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    adapter: DenoiserAdapter | None = None,
    components: Mapping[str, str] | None = None,
    memory: float | None = None,
) -> Quantized:
    """Quantize the denoiser of `model` by `recipe` and save the packed pipeline to `out`.

    `weights`, `activations`: bits, instead of the recipe's. `steps`: sampling steps to calibrate
    for. `settings`: recipe values by dotted name, as `{"block_distillation.iterations": 300}`.
    Unfinished work is kept beside `out` (`OUT.work`); with `resume` it is taken up, and the
    checkpoint comes out byte for byte as if nothing had happened. Without `out` nothing is saved.
    `prompts`, `labels`: what the calibration images are of, one after another and over again; a
    pipeline that draws images of texts needs prompts, one that draws images of classes takes all
    of them unless told otherwise. `guidance`: scale of classifier-free guidance, else the
    pipeline's. `call`: further arguments of the pipeline, such as `height`. `adapter`: what the
    denoiser consists of, where stepquant does not know its architecture (`general_adapter`).
    `components`: others that get 8-bit weights, dequantized on use, as
    `{"text_encoder": "w8", "vae": "w8"}`; calibration is done with the float ones.
    `memory`: GiB that the process may take, instead of all that is free: a calibration that is
    predicted to need more is refused before it starts, and activations that do not fit are kept in
    files beside `out` meanwhile.

    Raises StepQuantError for anything in the input that is not as expected.
    """
    reporter = reporter or Reporter(quiet=True)
    resolved = resolve_recipe(recipe, weights, activations, steps, settings)
    target = None if out is None else Path(out)
    if target is not None and target.name in ("", ".."):
        raise StepQuantError(f"output folder is '{out}': expected the name of a new folder")
    check_seed(seed)
    work_path = None if target is None else target.with_name(target.name + ".work")
    # A kill between the rename of a finished checkpoint and the end leaves both folders.
    finished = resume and work_path is not None and work_path.exists()
    if target is not None and not finished:
        check_new_folder(target)
    pipeline = open_pipeline(model, map_large=True)
    component = denoiser_name(pipeline)
    float_model = getattr(pipeline, component)
    check_no_lora(pipeline)
    components = dict(components or {})
    check_components(pipeline, component, components)
    check_denoiser(float_model, f"{component} of '{type(pipeline).__name__}'")
    adapter = adapter or adapter_of(pipeline, float_model)
    # What the scheme, the sampler and the weights have wrong is told before any work is kept.
    check_finite_weights(float_model)
    _, left_float = resolved.scheme.layer_bits(float_model, adapter)
    blocks = adapter.blocks(float_model)
    for step in resolved.steps:
        step.check(resolved.scheme)
    resolved, remark = with_own_scheduler(pipeline, resolved, settings)
    if remark is not None:
        reporter.line(remark)
    conditioning = Conditioning.of(prompts, labels, guidance, call)
    conditioning.check(pipeline)
    sampler = copy.copy(pipeline)
    set_scheduler(sampler, resolved.calibration.scheduler)
    for step in resolved.steps:
        step.check_model(float_model, adapter, sampler.scheduler)
    calibration = resolved.calibration
    plan = plan_memory(
        float_model,
        f"the {component} of {type(pipeline).__name__}",
        resolved,
        blocks,
        sampler.scheduler,
        lambda: first_inputs(
            pipeline, calibration.steps, seed, calibration.scheduler, conditioning
        ),
        memory,
    )
    reset_peak_memory()
    started = time.monotonic()
    provenance = provenance_of(seed, pipeline, resolved.calibration, conditioning)
    if components:
        provenance["components"] = components
    plug_ins = plug_ins_of(resolved)
    if plug_ins:
        provenance["plug_ins"] = plug_ins
    job = {
        "recipe": resolved.to_dict(),
        "provenance": provenance,
        "model": fingerprint(FloatState(float_model)),
        "scheduler": json.loads(sampler.scheduler.to_json_string()),
        "blocks": blocks,
        "left_float": left_float,
        "skip_splits": adapter.skip_splits(float_model),
        "shape": getattr(pipeline, "shape", None),  # of a sample, where the user's code says it
    }
    work = WorkFolder(work_path, job, resume)
    remark = clipping_remark(sampler.scheduler)
    if remark is not None:
        reporter.line(remark)
    trajectories = calibration_trajectories(pipeline, resolved, seed, reporter, work, conditioning)
    context = StepContext(trajectories.grid())
    simulation, left_float = simulate(float_model, adapter, resolved.scheme, context)
    for name, reason in left_float.items():
        reporter.line(f"layer '{name}' stays float: {reason}")
    for name, reason in float_products(float_model, adapter).items():
        if resolved.scheme.attention_bits is not None:
            reporter.line(f"the products of attention '{name}' stay float: {reason}")
    session = Session(
        float_model=float_model,
        model=simulation,
        adapter=adapter,
        context=context,
        trajectories=trajectories,
        scheduler=calibrated_scheduler(sampler, resolved.calibration.steps),
        draw=drawer(
            pipeline, calibration.steps, calibration.scheduler, conditioning, calibration.batch
        ),
        weight_ranges=resolved.ranges.weights,
        activation_ranges=resolved.ranges.activations,
        seed=seed,
        reporter=reporter,
        work=work,
        spill=Spill(work.path or Path(tempfile.gettempdir()), plan.spilled_from),
        samples_per_step=min(SAMPLES_PER_STEP, calibration.batch),
    )
    for step in resolved.steps:
        step.apply(session)
    session.ensure_ranges()
    seconds = time.monotonic() - started

    packed = pack(simulation, resolved, left_float, provenance)
    result = copy.copy(pipeline)
    result.register_modules(**{component: packed})
    others = quantize_components(result, components)
    record = {
        "recipe": resolved.to_dict(),
        "bits": resolved.scheme.label,
        "protocol": resolved.scheme.protocol,
        "mean_weight_bits": mean_weight_bits(packed),
        "float32_bytes": float32_bytes(float_model),
        "seconds": round(seconds, 2),
        "resumed": resume,  # then seconds and peak memory are those of the last part
        "predicted_peak_memory_mb": as_mb(plan.prediction.peak),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "left_float": left_float,
        "attention_float": [
            name for name in adapter.attention_sites(float_model) if name not in session.attention()
        ],
        "reference_layers": reference_layers(packed),
        "components": others,
        "summary": session.summary,
        "provenance": provenance,
    }
    if target is not None:
        remove_partial(target)
        if not target.exists():
            save_pipeline(result, component, target)
        add_file_sizes(others, target)
        record["checkpoint_bytes"] = weight_file_bytes(target, component)
        record["times_smaller"] = record["float32_bytes"] / record["checkpoint_bytes"]
        work.remove()
    return Quantized(result, simulation, record)


def pack(
    simulation: nn.Module, recipe: Recipe, left_float: dict[str, str], provenance: dict[str, Any]
) -> nn.Module:
    """A packed copy of `simulation` that `save_pretrained` can write."""
    layers = quant_layers(simulation).values()
    packed = pack_model(copy_around(simulation, layers))
    config = StepQuantConfig(
        scheme=recipe.scheme.model_dump(mode="json"),
        float_layers=left_float,
        recipe=recipe.to_dict(),
        provenance=provenance,
    )
    attach_config(packed, config)
    return packed.eval()
