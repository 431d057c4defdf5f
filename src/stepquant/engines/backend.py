"""Backends of a quantized denoiser: a kernel for its layers, or an engine that replaces it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from stepquant.engines.captured_calls import recorded
from stepquant.engines.captured_calls.state import PATCHES
from stepquant.engines.fastest import FastestDenoiser
from stepquant.engines.openvino_denoiser import OpenVinoDenoiser
from stepquant.engines.target import Engine, Target
from stepquant.models.surgery import copy_around
from stepquant.pipelines.resolved import ResolvedPipeline
from stepquant.runtime.kernels.backend import Backend
from stepquant.runtime.layers.dynamic import Dynamic
from stepquant.runtime.layers.integer import IntegerLayer, is_packed
from stepquant.support.errors import StepQuantError


def set_backend(model: nn.Module, backend: str) -> None:
    """Run every integer layer of `model` on `backend`, and lay its weight out at once.

    Dynamic layers, which choose their kernels themselves, are laid out, too. Afterwards
    `torch.compile(fullgraph=True)` finds one graph; laying a weight out would break it.

    Args:
        model: a module with integer layers.
        backend: auto, native, onednn, int_mm, reference, or the name of another registered kernel.

    Raises:
        StepQuantError: there is no such kernel, or `backend` names OpenVINO.
    """
    if Target.parse(backend).engine is Engine.OPENVINO:
        raise StepQuantError(
            f"the backend '{backend}' runs a whole denoiser, not its layers: expected auto, "
            "native, onednn, int_mm or reference, or OpenVinoDenoiser(denoiser) instead of the "
            "denoiser"
        )
    for module in model.modules():
        if isinstance(module, IntegerLayer):
            module.backend = str(backend)
            module.prepare()
        elif isinstance(module, Dynamic):
            module.prepare()


@contextmanager
def settings_kept(model: nn.Module) -> Iterator[None]:
    """Context that restores the backends and memory modes of the integer layers of `model`."""
    before = [(m, m.backend, m.memory) for m in model.modules() if isinstance(m, IntegerLayer)]
    try:
        yield
    finally:
        for layer, backend, memory in before:
            if (layer.backend, layer.memory) != (backend, memory):
                layer.drop_layout()  # the next call lays it out again
                layer.backend, layer.memory = backend, memory


def with_backend(pipeline: DiffusionPipeline, backend: str) -> DiffusionPipeline:
    """Return a pipeline that runs on `backend`, without changing `pipeline`.

    A copy's layers share their tensors with those of `pipeline` and lay their weights out for
    themselves, so other threads may use `pipeline`. Only a denoiser that accelerate or diffusers
    offload is changed itself, because it serves one thread at a time.

    Args:
        pipeline: a pipeline with a quantized denoiser.
        backend: a kernel as in `set_backend`; or `openvino`, `openvino:DEVICE` or "fastest" (the
            faster of auto and `openvino`). "auto", and the kernel that all layers have already,
            return `pipeline` itself.

    Raises:
        StepQuantError: the denoiser has no packed layer, or the backend does not exist or cannot
            run it.
    """
    target = Target.parse(backend)
    if target.kernel == Backend.AUTO and target.engine is Engine.LAYERS:
        return pipeline
    resolved = ResolvedPipeline.of(pipeline)
    denoiser = resolved.denoiser
    if target.engine is Engine.LAYERS:
        if not is_packed(denoiser):
            raise StepQuantError(
                f"{type(denoiser).__name__} has no packed layer: expected a model that stepquant "
                f"quantize wrote for the backend '{backend}'"
            )
        layers = [module for module in denoiser.modules() if isinstance(module, IntegerLayer)]
        if all(layer.backend == target.kernel for layer in layers):
            return pipeline
        if any(name in module.__dict__ for module in denoiser.modules() for name in PATCHES):
            set_backend(denoiser, target.kernel)
            return pipeline
        twin = copy_around(denoiser, [denoiser])
        set_backend(twin, target.kernel)
        return resolved.with_denoiser(twin).pipeline
    other = (
        FastestDenoiser(denoiser)
        if target.device is None
        else OpenVinoDenoiser(denoiser, target.device)
    )
    return resolved.with_denoiser(other).pipeline


def with_captured_calls(
    pipeline: DiffusionPipeline, call: Mapping[str, Any] | None = None
) -> DiffusionPipeline:
    """Return a copy of `pipeline` that records and replays its packed denoiser's calls.

    The result is `pipeline` itself if calls cannot be recorded, or if the arguments `call` of the
    pipeline have a callback, which may change the denoiser between two steps.
    """
    resolved = ResolvedPipeline.find(pipeline)
    if resolved is None or any("callback" in key for key in call or {}):
        return pipeline
    found = recorded(resolved.denoiser)
    return pipeline if found is resolved.denoiser else resolved.with_denoiser(found).pipeline
