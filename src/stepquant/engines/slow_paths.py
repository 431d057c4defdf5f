"""Report of a packed model's slow fallbacks on this machine, in sentences."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import psutil
import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepquant.engines.captured_calls import state
from stepquant.models.rewritten_conv import RewrittenConv
from stepquant.pipelines.resolved import denoiser_of
from stepquant.runtime.kernels import Backend
from stepquant.runtime.kernels.onednn import pairs_saturate
from stepquant.runtime.layers.input_part import InputPart
from stepquant.runtime.layers.integer import FLOATS, IntegerLayer
from stepquant.runtime.ops import native
from stepquant.support.refusal import RefusalCode

# Reasons that the sentences about kernels already give.
TOLD_OF_KERNELS = (RefusalCode.NO_VNNI, RefusalCode.OTHER_KERNEL, RefusalCode.NO_PRODUCTS)


def slow_paths(model: nn.Module | DiffusionPipeline) -> list[str]:
    """Return one sentence per fallback that is slow on this machine, with its reason.

    Args:
        model: a pipeline or its denoiser, in its present state. Call this after a call of the
            denoiser or after `set_backend`.

    Returns:
        The sentences; none if everything runs on the fast path, or if the model has no packed
        layers. Fallbacks compute the same numbers, with the exceptions for fused blocks in
        docs/explanation/runtime.md.
    """
    if isinstance(model, DiffusionPipeline):
        model = denoiser_of(model)
    # Layers with sequential offloading are on the meta device between two calls.
    layers = [
        module
        for module in model.modules()
        if isinstance(module, IntegerLayer) and not module.weight_packed.is_meta
    ]
    for layer in layers:
        layer.context.ensure_rows()  # blocks ask for them, and this thread may not have called
    notes = [*_on_reference(layers)]
    if any(layer.weight_packed.is_cpu for layer in layers):
        notes += [*_without_vnni(layers), *_without_library(layers), *_plain_blocks(model)]
        notes += [*_rewritten(model), *_dtype(model), *_unrecorded(model), *_threads()]
    return notes


def _on_reference(layers: list[IntegerLayer]) -> Iterable[str]:
    reasons: Counter[str] = Counter()
    for layer in layers:
        for part in layer.prepared_parts():
            if part.weight.kernel.name == Backend.REFERENCE:
                asked = f"the backend '{layer.backend}' was chosen"
                reasons["; ".join(part.weight.reasons) or asked] += 1
    for reason, count in reasons.items():
        yield f"{count} layer inputs run on the reference kernel: {reason}"


def _without_vnni(layers: list[IntegerLayer]) -> Iterable[str]:
    parts = [part for layer in layers for part in layer.prepared_parts() if _on_onednn(part)]
    twice = sum(part.spec.pair_overflows_int16 for part in parts)
    if twice and pairs_saturate():
        yield (
            f"{twice} of {len(parts)} layer inputs take two kernel calls, and their blocks run "
            f"layer by layer: {_no_vnni()}"
        )


def _on_onednn(part: InputPart) -> bool:
    return part.weight.kernel.name == Backend.ONEDNN


def _no_vnni() -> str:
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return "the CPU has no VNNI" if cap is None else f"no VNNI, as ONEDNN_MAX_CPU_ISA is {cap}"


def _without_library(layers: list[IntegerLayer]) -> Iterable[str]:
    automatic = [layer for layer in layers if layer.backend == Backend.AUTO]
    parts = [part for layer in automatic for part in layer.prepared_parts()]
    slow = Counter(
        f"{Backend.NATIVE}: {part.weight.refusals[Backend.NATIVE]}"
        for part in parts
        if _on_onednn(part)
    )
    for why, count in slow.items():
        yield (
            f"{count} of {len(parts)} layer inputs run on oneDNN's kernels, which every call sets "
            f"up again: {why}"
        )
    reason = native.why_not()
    if reason is not None and any(layer.why_no_codes() is None for layer in layers):
        yield (
            "norms, activations and rounding are several passes of torch instead of one native "
            f"pass: {reason}"
        )


def _rewritten(model: nn.Module) -> Iterable[str]:
    library = native.library()
    if library is None or library.product_level != "avx2":
        return
    slower = [
        module
        for module in model.modules()
        if isinstance(module, RewrittenConv) and (module.transposed or module.only_in_time)
    ]
    if slower:
        yield (
            f"{len(slower)} of the layers are transposed convolutions or convolutions in time "
            "alone, which took 1.1 to 1.3 times as long as float ones in our benchmark: AVX2 has "
            "no dot products of integers"
        )


def _plain_blocks(model: nn.Module) -> Iterable[str]:
    blocks: list[Any] = [
        module
        for module in model.modules()
        if hasattr(module, "why_plain")
        and not any(
            isinstance(m, IntegerLayer) and m.weight_packed.is_meta for m in module.modules()
        )
    ]
    if not blocks:
        yield f"{type(model).__name__} has no blocks with a fused form: it runs layer by layer"
    reasons = Counter(block.why_plain() for block in blocks)
    for reason, count in reasons.items():
        if reason is not None and reason.code not in TOLD_OF_KERNELS:
            yield (
                f"{count} of {len(blocks)} blocks run the code of diffusers layer by layer: "
                f"{reason}"
            )


def _dtype(model: nn.Module) -> Iterable[str]:
    dtypes = {parameter.dtype for parameter in model.parameters()} - set(FLOATS)
    for dtype in sorted(dtypes, key=str):
        yield (
            f"{dtype} activations are rounded in several passes, and their blocks run layer by "
            "layer: the fused forms take float32 and bfloat16"
        )


def _unrecorded(model: nn.Module) -> Iterable[str]:
    reason = state.why_not(model)
    if reason is not None and reason.code not in TOLD_OF_KERNELS:
        yield f"each call runs its Python code, because calls are not recorded: {reason}"


def _threads() -> Iterable[str]:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    # torch's default is one thread per core, not per hardware thread.
    processors = min(processors, psutil.cpu_count(logical=False) or processors)
    if torch.get_num_threads() < processors:
        yield (
            f"torch uses {torch.get_num_threads()} of {processors} processors: set by "
            "OMP_NUM_THREADS or torch.set_num_threads"
        )
