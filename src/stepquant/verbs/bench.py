"""Latency and size of a quantized denoiser and its float one, timed in turns in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepquant.calibration.survey import adapter_of
from stepquant.engines.backend import set_backend
from stepquant.engines.captured_calls import recorded
from stepquant.engines.openvino_denoiser import OpenVinoDenoiser
from stepquant.engines.slow_paths import slow_paths
from stepquant.engines.target import Target
from stepquant.evaluation import measure_latency
from stepquant.models.adapter import DenoiserAdapter, adapter_for
from stepquant.models.calling import named_arguments, on_device
from stepquant.pipelines.opening import open_pipeline
from stepquant.pipelines.resolved import ResolvedPipeline
from stepquant.pipelines.sampling import check_count
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.kinds import Kind, kind_of
from stepquant.runtime.layers.resident import set_memory_mode, weight_bytes_resident
from stepquant.support.errors import StepQuantError
from stepquant.support.process_memory import peak_memory_mb
from stepquant.support.progress import Reporter


def denoiser_call(
    model: nn.Module,
    batch: int,
    timestep: int | None = None,
    compiled: bool = False,
    adapter: DenoiserAdapter | None = None,
    runs: nn.Module | None = None,
) -> Callable[[], object]:
    """Return a function without arguments that calls the denoiser on random input.

    Args:
        model: the denoiser; its config gives the shapes of the input.
        batch: number of samples.
        timestep: timestep of all samples; None chooses one in the middle.
        compiled: call the denoiser under `torch.compile`.
        adapter: adapter of the denoiser; by default the one of its architecture.
        runs: module that takes the calls instead of `model`. By default, calls of a quantized
            denoiser are recorded and replayed if possible.
    """
    device = next(model.buffers(), next(model.parameters())).device
    sample, at, conditions = (adapter or adapter_for(model)).random_inputs(model, batch)
    if timestep is not None:
        at = torch.full_like(at, timestep)
    # Move the input before the clock runs: the transfer is not part of the latency.
    sample, at, arguments = on_device((sample, at, named_arguments(model, conditions)), device)
    # Compile the whole call: one graph serves all timesteps.
    target = torch.compile(model, dynamic=False) if compiled else runs or recorded(model)

    def call() -> object:
        with torch.no_grad():
            return target(sample, timestep=at, **arguments)

    return call


def bench(
    model: str | Path | DiffusionPipeline,
    against: str | Path | DiffusionPipeline,
    batch: Sequence[int] = (1, 4, 16),
    backend: str = "auto",
    compiled: bool = False,
    repeats: int = 20,
    reporter: Reporter | None = None,
    adapter: DenoiserAdapter | None = None,
    memory: str = "fast",
) -> dict[str, Any]:
    """Time one denoiser call of the quantized `model` and of the float model `against`.

    Args:
        model: a quantized pipeline, its folder, or a hub id.
        against: the float pipeline, its folder, a hub id, or "builtin:NAME".
        batch: batch sizes to time.
        backend: kernel of integer layers, see `engines.backend.set_backend`. `openvino` or
            `openvino:DEVICE` also times the model on OpenVINO, next to the layers' best kernels.
        compiled: also time both models under `torch.compile`; the first calls take minutes.
        repeats: timed rounds; each round calls every model once.
        reporter: where progress is shown; silent by default.
        adapter: adapter of an architecture that stepquant does not know, as in `quantize`.
        memory: memory mode of integer layers, see `set_memory_mode`.

    Returns:
        JSON values: `rows` with the median, 10th and 90th percentile in ms and the speedup of each
        model and batch size; `kind`, the arithmetic of the quantized layers ("integer",
        "weight-only" or "dynamic", see `runtime.layers.kinds`); the number of layer inputs by
        kernel; the size of the weights in memory; `openvino` with its kernels and which engine is
        faster, or None; and `slow_paths`, the fallbacks that are slow on this machine.

    Raises:
        StepQuantError: `model` is not quantized, `against` is, or an argument is not as described.
    """
    reporter = reporter or Reporter(quiet=True)
    for size in batch:
        check_count(size, "batch size")
    ours, theirs = (ResolvedPipeline.of(open_pipeline(each)) for each in (model, against))
    candidate, reference = ours.denoiser, theirs.denoiser
    kind = kind_of(candidate)
    if kind is None:
        raise StepQuantError(
            f"'{model}' has no packed layer: expected a folder that stepquant quantize wrote"
        )
    if kind_of(reference) is not None:
        raise StepQuantError(f"'{against}' is quantized: expected the float model to compare with")
    device = Target.parse(backend).device
    if kind is Kind.INTEGER:
        set_memory_mode(candidate, memory)
        set_backend(candidate, backend if device is None else "auto")
    elif (backend, memory) != ("auto", "fast"):
        raise StepQuantError(
            f"the backend '{backend}' and the memory mode '{memory}' were requested for a denoiser "
            f"whose layers are {kind.value}: expected auto and fast, because only integer layers "
            "have others"
        )
    openvino = None if device is None else OpenVinoDenoiser(candidate, device)
    adapter = adapter or adapter_of(theirs)
    rows, faster = [], {}
    with reporter.task("timing", total=len(batch)) as task:
        for size in batch:
            calls = {
                "float32": denoiser_call(reference, size, adapter=adapter),
                "quantized": denoiser_call(candidate, size, adapter=adapter),
            }
            if openvino is not None:
                calls["openvino"] = denoiser_call(candidate, size, adapter=adapter, runs=openvino)
            if compiled:
                for label, denoiser in (("float32", reference), ("quantized", candidate)):
                    calls[f"{label} compiled"] = denoiser_call(
                        denoiser, size, compiled=True, adapter=adapter
                    )
            timings = measure_latency(calls, repeats)
            for name, timing in timings.items():
                rows.append(
                    {
                        "batch": size,
                        "model": name,
                        "median_ms": timing.median_ms,
                        "p10_ms": timing.p10,
                        "p90_ms": timing.p90,
                        "times_faster": timings["float32"].median_ms / timing.median_ms,
                    }
                )
            if openvino is not None:
                both = ("quantized", "openvino")
                faster[size] = min(both, key=lambda name: timings[name].median_ms)
            task.advance()
    kernels: dict[str, int] = {}
    for module in candidate.modules():
        if isinstance(module, IntegerLayer):
            for name in module.kernel_names():
                kernels[name] = kernels.get(name, 0) + 1
    measured: dict[str, Any] | None = None
    if openvino is not None:
        measured = {"device": device, "kernels": openvino.kernels()}
    if measured is not None:
        measured["faster"] = [{"batch": size, "model": name} for size, name in faster.items()]
    weights = weight_bytes_resident(candidate)
    return {
        "kind": kind.value,
        "rows": rows,
        "kernels": kernels,
        "openvino": measured,
        "weights": {
            "memory": memory,
            "resident_bytes": weights.resident,
            "float32_bytes": weights.float32,
            "times_smaller": weights.times_smaller,
        },
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "peak_memory_mb": peak_memory_mb(),
        "slow_paths": slow_paths(candidate),
    }
