"""`quantize`, the main function: from a float pipeline to a packed one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from stepquant.calibration.observe import quant_layers
from stepquant.checkpoint.config import StepQuantConfig
from stepquant.checkpoint.save import attach_config, save_pipeline
from stepquant.methods.recipe import Recipe, WeightOnlyRecipe, load_recipe
from stepquant.models.adapter import DenoiserAdapter
from stepquant.models.surgery import copy_around
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.opening import weight_file_bytes
from stepquant.pipelines.sampling import check_seed
from stepquant.simulation.packing import pack_model
from stepquant.support.atomic import remove_partial
from stepquant.support.process_memory import reset_peak_memory
from stepquant.support.progress import Reporter
from stepquant.support.work_folder import WorkFolder
from stepquant.verbs.calibration_inputs import calibration_trajectories
from stepquant.verbs.quantize_job import (
    Job,
    begin_session,
    check_output,
    open_float,
    plan_job,
    with_settings,
    work_path,
)
from stepquant.verbs.quantize_record import record_of
from stepquant.verbs.quantize_weight_only import check_unused, quantize_weight_only
from stepquant.verbs.quantized import Quantized
from stepquant.weight_only.components import add_file_sizes, quantize_components


def quantize(
    model: str | Path | DiffusionPipeline,
    recipe: str | Path | Recipe | WeightOnlyRecipe = "stepquant",
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
    """Quantize the denoiser of `model` by `recipe` and save the quantized pipeline to `out`.

    A weight-only recipe, such as "weight-only", takes only `weights` (4 or 8), `out`, `settings`
    and `components`. It needs no calibration, and streams the files of a folder or hub id to new
    shards, layer by layer.

    Args:
        model: a float pipeline in float32 on the CPU, its folder, a safetensors file, a hub id, or
            "builtin:NAME".
        recipe: a recipe, its name, or the path of a YAML file.
        weights: bits of weights, instead of the recipe's.
        activations: bits of activations, instead of the recipe's.
        out: the new folder. None saves nothing.
        steps: sampling steps to calibrate for, instead of the recipe's.
        settings: settings of the recipe by dotted name, such as
            `{"block_distillation.iterations": 300}`.
        seed: seed of calibration and training.
        resume: continue the unfinished job in `OUT.work`, the folder next to `out`. The checkpoint
            is byte for byte that of an uninterrupted run.
        reporter: where progress is shown; silent by default.
        prompts: prompts of the calibration images, which take them in turn; required by pipelines
            that take prompts.
        labels: class labels of the calibration images, which take them in turn; by default all
            classes.
        guidance: scale of classifier-free guidance; by default the pipeline's own.
        call: further arguments of the pipeline, such as `height`.
        adapter: the parts of a denoiser whose architecture stepquant does not know, see
            `general_adapter`.
        components: other components with 8-bit or 4-bit weights, dequantized on use, such as
            `{"text_encoder": "w8", "vae": "w8"}`. Calibration uses the float ones.
        memory: GiB that the process may hold; by default all free memory. A calibration that is
            predicted to need more is refused before it starts. Activations that do not fit are kept
            in temporary files next to `out`.

    Returns:
        The packed pipeline, the simulation, and a record of the run.

    Raises:
        StepQuantError: the model, the recipe or an argument is not as described, or the calibration
            would not fit in memory.
    """
    reporter = reporter or Reporter(quiet=True)
    loaded = load_recipe(recipe)
    if isinstance(loaded, WeightOnlyRecipe):
        unused = {
            "activations": activations,
            "steps": steps,
            "seed": seed or None,
            "resume": resume,
            "prompts": prompts,
            "labels": labels,
            "guidance": guidance,
            "call": call,
            "adapter": adapter,
            "memory": memory,
        }
        check_unused(loaded, unused)
        weight_only = with_settings(loaded, weights, None, None, settings)
        return quantize_weight_only(model, weight_only, out, components, reporter)
    chosen = with_settings(loaded, weights, activations, steps, settings)
    target = check_output(out, resume)
    check_seed(seed)
    source = open_float(model, adapter, components or {})
    conditioning = Conditioning.of(prompts, labels, guidance, call)
    job = plan_job(source, chosen, settings, conditioning, seed, components or {}, memory, reporter)
    reset_peak_memory()
    started = time.monotonic()
    work = WorkFolder(None if target is None else work_path(target), job.description(), resume)
    trajectories = calibration_trajectories(job, work, reporter)
    session = begin_session(job, trajectories, work, reporter)
    for step in job.recipe.steps:
        step.apply(session)
    session.ensure_ranges()
    seconds = time.monotonic() - started
    packed = packed_denoiser(session.model, job)
    result = source.with_denoiser(packed).pipeline
    others = quantize_components(result, job.components)
    record = record_of(job, session, packed, others, seconds, resume)
    if target is not None:
        save(result, source.name, target, record)
        work.remove()
    return Quantized(result, session.model, record)


def packed_denoiser(simulation: nn.Module, job: Job) -> nn.Module:
    """Return a packed copy of `simulation`, with the config that `save_pretrained` writes."""
    layers = quant_layers(simulation).values()
    packed = pack_model(copy_around(simulation, layers))
    config = StepQuantConfig(
        scheme=job.recipe.scheme.model_dump(mode="json"),
        float_layers=job.left_float,
        recipe=job.recipe.to_dict(),
        provenance=job.provenance,
    )
    attach_config(packed, config)
    return packed.eval()


def save(result: DiffusionPipeline, component: str, target: Path, record: dict[str, Any]) -> None:
    """Write the pipeline to `target`, unless a killed run did, and add its sizes to `record`."""
    remove_partial(target)
    if not target.exists():
        save_pipeline(result, component, target)
    add_file_sizes(record["components"], target)
    record["checkpoint_bytes"] = weight_file_bytes(target, component)
    record["times_smaller"] = record["float32_bytes"] / record["checkpoint_bytes"]
