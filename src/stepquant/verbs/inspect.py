"""Layer statistics of a float or a quantized model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepquant.calibration.called_layers import never_called
from stepquant.calibration.observe import observe
from stepquant.calibration.survey import adapter_of
from stepquant.calibration.trajectories import capture_trajectories
from stepquant.checkpoint.validate import packed_attention
from stepquant.methods.outlier_mixed_bits import kurtosis
from stepquant.methods.weight_dilation import dilation_factors
from stepquant.models.adapter import DenoiserAdapter
from stepquant.models.attention_processor import PRODUCTS
from stepquant.models.eligibility import LAYERS
from stepquant.models.input_bypass import bypass_of
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.opening import open_pipeline
from stepquant.pipelines.resolved import ResolvedPipeline
from stepquant.pipelines.sampling import AUTO
from stepquant.quantizers import StepContext
from stepquant.reporting.plots import check_plots, write_plots
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.kinds import Kind, kind_of
from stepquant.runtime.layers.layer_tensors import IN_CONFIG
from stepquant.runtime.layers.weight_only import WeightOnly
from stepquant.simulation.scheme import Scheme
from stepquant.simulation.simulate import simulate
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter


def inspect(
    model: str | Path | DiffusionPipeline,
    plots: str | Path | None = None,
    steps: int = 50,
    scheduler: str | None = AUTO,
    num: int = 8,
    seed: int = 0,
    reporter: Reporter | None = None,
    *,
    prompts: str | Sequence[str] | None = None,
    labels: int | Sequence[int] | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    adapter: DenoiserAdapter | None = None,
) -> dict[str, Any]:
    """Return statistics of a denoiser's layers.

    - Float model: samples `num` images, and reports each layer's activation range at every step,
      the share of in-channels that Weight Dilation can scale, and the kurtosis of its weights.
    - Calibrated model: bits, bytes, kernels and step tables.
    - Model quantized without calibration: bits and bytes.

    Args:
        model: a pipeline, its folder, a hub id, or "builtin:NAME".
        plots: new folder for plots, which need the extra [evaluate]; None draws none.
        steps: sampling steps of a float model.
        scheduler: its scheduler; "auto" chooses one, "own" keeps the pipeline's.
        num: number of images.
        seed: seed of the first image.
        reporter: where progress is shown; silent by default.
        prompts: prompts of the images, as in `quantize`.
        labels: class labels of the images, as in `quantize`.
        guidance: scale of classifier-free guidance, as in `quantize`.
        call: further arguments of the pipeline, as in `quantize`.
        adapter: adapter of an architecture that stepquant does not know, as in `quantize`.

    Returns:
        JSON values: `packed`, whether the model is quantized; `layers` with a dictionary for each
        layer; and `plots`, the files drawn.

    Raises:
        StepQuantError: a model or an argument is not as described, or the model has no plots.
    """
    reporter = reporter or Reporter(quiet=True)
    if plots is not None:
        check_plots(plots)
    source = ResolvedPipeline.of(open_pipeline(model, reporter=reporter))
    denoiser = source.denoiser
    kind = kind_of(denoiser)
    if kind is Kind.INTEGER:
        record = inspect_packed(denoiser)
    elif kind is not None:
        if plots is not None:
            raise StepQuantError(
                f"the denoiser of {source.kind} was quantized without calibration and has no step "
                "tables to plot: expected a float or a calibrated model; leave the plots out"
            )
        record = inspect_weight_only(denoiser, kind)
    else:
        conditioning = Conditioning.of(prompts, labels, guidance, call)
        source = replace(source, adapter=adapter)
        record = inspect_float(source, steps, scheduler, num, seed, reporter, conditioning)
    if plots is not None:
        with reporter.task("drawing plots", total=None):
            record["plots"] = [str(path) for path in write_plots(record, plots)]
    return record


def inspect_packed(denoiser: Any) -> dict[str, Any]:
    """Return bits, bytes, kernels and step tables of a packed denoiser's layers and attention."""
    layers = []
    for name, module in denoiser.named_modules():
        if isinstance(module, IntegerLayer):
            present = module.present()
            layers.append(
                {
                    "layer": name,
                    "weight_bits": module.spec.mean_weight_bits,
                    "activation_bits": module.spec.activation_bits,
                    "packed_bytes": module.weight_packed.numel(),
                    "parts": list(module.splits),
                    "kernels": module.kernel_names(),
                    "act_scale": module.act_scale.tolist(),
                    "act_zero_point": module.act_zero_point.tolist(),
                    **{key: tensor.name in present for key, tensor in IN_CONFIG.items()},
                }
            )
    attention = [
        {
            "attention": name.removesuffix(PRODUCTS),
            "bits": products.bits,
            "probability_bits": products.probability_bits,
            "act_scale": products.act_scale.tolist(),
            "act_zero_point": products.act_zero_point.tolist(),
            "probability_scale": products.probability_scale.tolist(),
            "probability_log2": products.probability_log2.bool().tolist(),
        }
        for name, products in packed_attention(denoiser).items()
    ]
    bypass = bypass_of(denoiser)
    passed = None if bypass is None else {"layer": bypass.layer, "slopes": bypass.slopes.tolist()}
    return {
        "packed": True,
        "kind": Kind.INTEGER.value,
        "timesteps": denoiser.step_grid.tolist(),
        "layers": layers,
        "attention": attention,
        "input_error_bypass": passed,
    }


def inspect_weight_only(denoiser: nn.Module, kind: Kind) -> dict[str, Any]:
    """Return bits and bytes of the layers of a denoiser quantized without calibration."""
    layers = [
        {
            "layer": name,
            "weight_bits": 8 if module.weight_zero_point is None else 4,
            "packed_bytes": module.weight.numel(),
            "float32_bytes": 4 * math.prod(module.weight_shape),
        }
        for name, module in denoiser.named_modules()
        if isinstance(module, WeightOnly)
    ]
    quantized = {row["layer"] for row in layers}
    left_float = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, LAYERS) and name not in quantized
    ]
    return {
        "packed": True,
        "kind": kind.value,
        "timesteps": [],
        "layers": layers,
        "float_layers": left_float,
    }


@torch.no_grad()
def inspect_float(
    source: ResolvedPipeline,
    steps: int,
    scheduler: str | None,
    num: int,
    seed: int,
    reporter: Reporter,
    conditioning: Conditioning | None = None,
) -> dict[str, Any]:
    """Return ranges by step, unsaturated share and kurtosis for each layer of a float denoiser."""
    trajectories = capture_trajectories(
        source.pipeline, num, steps, seed, scheduler, reporter=reporter, conditioning=conditioning
    )
    context = StepContext(trajectories.grid())
    uncalled = never_called(source.denoiser, trajectories)
    simulation, left_float = simulate(
        source.denoiser, adapter_of(source), Scheme(), context, uncalled
    )
    seen = observe(simulation, trajectories, num, seed, reporter)
    layers = []
    for (name, part), observation in seen.items():
        layer: Any = simulation.get_submodule(name)
        weight = layer.weight_parts()[part]
        factors = dilation_factors(weight, 100.0)
        layers.append(
            {
                "layer": name,
                "part": part,
                "unsaturated_share": float((factors > 1).float().mean()),
                "median_kurtosis": float(kurtosis(weight).median()),
                "low": [float(low.min()) for low in observation.low],
                "high": [float(high.max()) for high in observation.high],
            }
        )
    return {
        "packed": False,
        "timesteps": trajectories.timesteps.tolist(),
        "left_float": left_float,
        "layers": layers,
    }
