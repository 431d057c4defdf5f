"""Backends of a quantized denoiser: one kernel for its layers, or an engine in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from stepquant.engines.captured_calls import recorded
from stepquant.engines.fastest import FASTEST, FastestDenoiser
from stepquant.engines.openvino_denoiser import OpenVinoDenoiser, device_of
from stepquant.pipelines.sampling import denoiser_name, denoiser_of, known_denoiser, with_denoiser
from stepquant.runtime.layers.integer import IntegerLayer, is_packed
from stepquant.runtime.layers.resident import restore
from stepquant.support.errors import StepQuantError


def set_backend(model: nn.Module, backend: str) -> None:
    """Run every packed layer of `model` on `backend`: auto, native, onednn, int_mm or reference."""
    if device_of(backend) is not None:
        raise StepQuantError(
            f"the backend '{backend}' runs a whole denoiser, not its layers: expected auto, "
            "native, onednn, int_mm or reference, or OpenVinoDenoiser(denoiser) in the "
            "denoiser's place"
        )
    for module in model.modules():
        if isinstance(module, IntegerLayer):
            module.backend = backend
            module.prepare()


@contextmanager
def settings_kept(model: nn.Module) -> Iterator[None]:
    """Give the packed layers of `model` back the backend and memory mode that they came with."""
    before = [(m, m.backend, m.memory) for m in model.modules() if isinstance(m, IntegerLayer)]
    try:
        yield
    finally:
        for layer, backend, memory in before:
            if (layer.backend, layer.memory) != (backend, memory):
                restore(layer)  # it is laid out anew by its next call
                layer.backend, layer.memory = backend, memory


def with_backend(pipeline: DiffusionPipeline, backend: str) -> DiffusionPipeline:
    """`pipeline` on `backend`: its packed layers, or for openvino a copy with its denoiser there.

    `backend`: as in `set_backend`, or `openvino`, `openvino:DEVICE` for another device than the
    CPU, or "fastest", which times the two. "auto" leaves everything as it is.
    """
    if backend == "auto":
        return pipeline
    denoiser, device = denoiser_of(pipeline), device_of(backend)
    if device is None and backend != FASTEST:
        if not is_packed(denoiser):
            raise StepQuantError(
                f"{type(denoiser).__name__} has no packed layer: expected a model that stepquant "
                f"quantize wrote for the backend '{backend}'"
            )
        set_backend(denoiser, backend)
        return pipeline
    other = FastestDenoiser(denoiser) if device is None else OpenVinoDenoiser(denoiser, device)
    return with_denoiser(pipeline, denoiser_name(pipeline), other)


def with_captured_calls(
    pipeline: DiffusionPipeline, call: Mapping[str, Any] | None = None
) -> DiffusionPipeline:
    """A copy of `pipeline` that captures its packed denoiser's calls, or `pipeline` as it is.

    `call`: arguments that the pipeline will get. A callback among them may change the denoiser
    between two steps, so nothing is captured then.
    """
    name = known_denoiser(pipeline)
    if name is None or any("callback" in key for key in call or {}):
        return pipeline
    denoiser = getattr(pipeline, name)
    found = recorded(denoiser)
    return pipeline if found is denoiser else with_denoiser(pipeline, name, found)
