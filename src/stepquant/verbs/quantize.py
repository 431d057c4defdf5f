"""`quantize`, the main function: from a float pipeline to a packed one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepquant.calibration.observe import quant_layers
from stepquant.calibration.trajectories import Trajectories, predict
from stepquant.checkpoint.config import StepQuantConfig
from stepquant.checkpoint.file_sums import file_digests
from stepquant.checkpoint.loadable import check_loadable
from stepquant.checkpoint.rebuild import why_not_rebuilt
from stepquant.checkpoint.save import attach_config, save_pipeline
from stepquant.methods.recipe import Recipe, WeightOnlyRecipe, load_recipe
from stepquant.models.adapter import DenoiserAdapter
from stepquant.models.surgery import copy_around
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.opening import weight_file_bytes
from stepquant.pipelines.sampling import check_seed
from stepquant.simulation.packing import pack_model
from stepquant.support.atomic import remove_partial
from stepquant.support.errors import StepQuantError
from stepquant.support.lock import held
from stepquant.support.process_memory import reset_peak_memory
from stepquant.support.progress import Reporter
from stepquant.support.safetensors_file import first_line
from stepquant.support.work_folder import WorkFolder
from stepquant.verbs.calibration_inputs import calibration_trajectories
from stepquant.verbs.quantize_job import (
    Job,
    begin_session,
    check_output,
    is_saved,
    open_float,
    plan_job,
    with_settings,
    without_uncalled,
    work_path,
)
from stepquant.verbs.quantize_record import denoisers_left, record_of
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
    kept = chosen.scheme.modules_to_not_convert
    source = open_float(model, adapter, components or {}, kept, reporter)
    if target is not None:
        reason = why_not_rebuilt(source.denoiser)
        if reason is not None:
            raise StepQuantError(reason)
        check_loadable(source.pipeline)
    conditioning = Conditioning.of(prompts, labels, guidance, call)
    with reporter.task("checking the model and the recipe", total=None):
        job = plan_job(
            source, chosen, settings, conditioning, seed, components or {}, memory, reporter
        )
    for name in denoisers_left(job):
        warnings.warn(
            f"the denoiser '{name}' of {source.kind} stays float: a calibrated recipe quantizes "
            f"'{source.name}' only; components={{'{name}': 'w8'}} quantizes the other's weights",
            stacklevel=2,
        )
    reset_peak_memory()
    path = None if target is None else work_path(target)
    with held(path):
        with reporter.task("reading the float weights", total=None):
            description = {} if path is None else job.description()
        work = WorkFolder(path, description, resume)
        saved = is_saved(target, work)
        return run(job, target, work, saved, reporter)


def run(
    job: Job, target: Path | None, work: WorkFolder, saved: bool, reporter: Reporter
) -> Quantized:
    """Do the `job`, with its finished pieces in `work`, and save the result to `target`.

    `saved`: a killed run has saved it already.
    """
    source, started = job.source, time.monotonic()
    trajectories = calibration_trajectories(job, work, reporter)
    job = without_uncalled(job, trajectories)
    session = begin_session(job, trajectories, work, reporter)
    for number, step in enumerate(job.recipe.steps, 1):
        with reporter.task(f"step {number} of {len(job.recipe.steps)}, {step.name}", total=None):
            step.apply(session)
    session.ensure_ranges()
    seconds = time.monotonic() - started
    packed = packed_denoiser(session.model, job, reporter)
    check_runs(packed, trajectories, f"{source.name} of '{source.kind}'")
    result = source.with_denoiser(packed).pipeline
    others = quantize_components(result, job.components, reporter)
    record = record_of(job, session, packed, others, seconds, work.resumed)
    if target is not None:
        with reporter.task(f"saving {target}", total=None):
            save(result, source.name, target, record, work, saved)
        work.remove()
    return Quantized(result, session.model, record)


def packed_denoiser(simulation: nn.Module, job: Job, reporter: Reporter) -> nn.Module:
    """Return a packed copy of `simulation`, with the config that `save_pretrained` writes."""
    layers = quant_layers(simulation).values()
    packed = pack_model(copy_around(simulation, layers), reporter)
    config = StepQuantConfig(
        scheme=job.recipe.scheme.model_dump(mode="json"),
        float_layers=job.left_float,
        recipe=job.recipe.to_dict(),
        provenance=job.provenance,
    )
    attach_config(packed, config)
    return packed.eval()


@torch.no_grad()
def check_runs(packed: nn.Module, trajectories: Trajectories, what: str) -> None:
    """Call the `packed` denoiser, named `what`, with the first inputs of one image.

    Raises StepQuantError for any error, before something is written that nobody can use.
    """
    try:
        predict(packed, trajectories.step(0, 1))
    except StepQuantError:
        raise
    except Exception as error:
        raise StepQuantError(
            f"the quantized {what} cannot be called ({type(error).__name__}: {first_line(error)}): "
            "expected it to run like the float one; keep the modules float that the error comes "
            "from (scheme.modules_to_not_convert)"
        ) from error


def save(
    result: DiffusionPipeline,
    component: str,
    target: Path,
    record: dict[str, Any],
    work: WorkFolder,
    saved: bool,
) -> None:
    """Write the pipeline to `target`, unless a killed run did, and add its sizes to `record`.

    `work` notes what is written, so that a resumed run recognizes it.
    """
    remove_partial(target)
    if not (saved and target.exists()):
        try:
            save_pipeline(
                result,
                component,
                target,
                before=lambda folder: work.note_result(file_digests(folder)),
            )
        except StepQuantError as error:
            raise StepQuantError(
                f"{error}; the finished work is kept in '{work.path}', continue with --resume"
            ) from error
    add_file_sizes(record["components"], target)
    record["checkpoint_bytes"] = weight_file_bytes(target, component)
    record["times_smaller"] = record["float32_bytes"] / record["checkpoint_bytes"]
