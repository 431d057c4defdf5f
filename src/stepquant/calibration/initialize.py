"""Initial ranges for all quantizers of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepquant.calibration.observe import Observation, observe, quant_attention, quant_layers
from stepquant.calibration.ranges import search_activation_range, search_weight_range
from stepquant.calibration.trajectories import Trajectories
from stepquant.numerics import range_to_grid
from stepquant.quantizers import ActivationQuantizer, ProbabilityQuantizer, QuantLayer
from stepquant.quantizers.weight import GridSearch, minmax_weight_range
from stepquant.support.progress import Reporter


def weight_search(method: str) -> GridSearch:
    """Return the search for weight ranges that a recipe names "minmax" or "mse"."""
    return minmax_weight_range if method == "minmax" else search_weight_range


@torch.no_grad()
def initialize_weights(layer: QuantLayer, method: str) -> None:
    """Set the weight ranges of `layer` by `method`, "minmax" or "mse"."""
    layer.fit_weights(weight_search(method))


@torch.no_grad()
def initialize_activations(
    quantizer: ActivationQuantizer, observation: Observation, method: str, common: bool = False
) -> None:
    """Set each row of the quantizer's step table by `method`, "minmax" or "mse".

    Row `t` is fitted to the values observed at step `t`. A quantizer with one row is fitted to all
    steps together. With `common`, all rows get the range of all steps together.
    """
    low = torch.stack(observation.low).amin(dim=1)  # [T]
    high = torch.stack(observation.high).amax(dim=1)
    common = common or quantizer.steps == 1
    scale, zero_point = _find_grids(quantizer.bits, observation, low, high, method, common)
    quantizer.scale.data.copy_(scale)
    quantizer.zero_point.data.copy_(zero_point)


@torch.no_grad()
def initialize_probabilities(
    quantizer: ProbabilityQuantizer, observation: Observation, method: str, common: bool = False
) -> None:
    """Set each row of the quantizer's step table to a uniform grid that starts at zero.

    The method "minmax" ends the grid at the largest probability; "mse" searches for the end with
    the least error. A quantizer with one row is fitted to all steps together. With `common`, all
    rows get the range of all steps together.
    """
    high = torch.stack(observation.high)[:, 0]  # [T]
    low = torch.zeros_like(high)
    common = common or quantizer.steps == 1
    scale, _ = _find_grids(quantizer.bits, observation, low, high, method, common)
    quantizer.scale.data.copy_(scale)


def _find_grids(
    bits: int, observation: Observation, low: Tensor, high: Tensor, method: str, common: bool
) -> tuple[Tensor, Tensor]:
    """Return `(scale, zero_point)` for ranges `low [T]` to `high [T]`, each `[T]`.

    With `common`, each is `[1]`, for all steps together.
    """
    values, weights = torch.stack(observation.values), torch.stack(observation.weights)  # [T, n]
    if common:
        low, high = low.amin().view(1), high.amax().view(1)
        values, weights = values.view(1, -1), weights.view(1, -1)
    if method == "minmax":
        return range_to_grid(low, high, bits)
    return search_activation_range(values, low, high, bits, weights=weights)


def initialize_ranges(
    model: nn.Module,
    trajectories: Trajectories,
    weights: str,
    activations: str,
    seed: int,
    per_step: int,
    reporter: Reporter,
    common: bool = False,
) -> None:
    """Set the initial ranges of all quantizers in `model`, then switch quantization on.

    Activation ranges are fitted to the float activations of `trajectories`.

    Args:
        model: simulated model, which still computes in float.
        trajectories: calibration inputs.
        weights: method for weight ranges, "minmax" or "mse".
        activations: method for activation ranges, "minmax" or "mse".
        seed: seed of the random draw of activations.
        per_step: number of images at each step.
        reporter: shows progress.
        common: give all rows of a step table the range of all steps together.

    Raises:
        StepQuantError: an activation is not finite.
    """
    layers = quant_layers(model)
    observations = observe(model, trajectories, per_step, seed, reporter)
    attentions = quant_attention(model)
    with reporter.task("searching ranges", total=len(layers) + len(attentions)) as task:
        for name, layer in layers.items():
            initialize_weights(layer, weights)
            for index, quantizer in enumerate(layer.activation_quantizers):
                assert isinstance(quantizer, ActivationQuantizer)
                initialize_activations(quantizer, observations[name, index], activations, common)
            layer.quantizing = True
            task.advance(note=name)
        for name, attention in attentions.items():
            for index, quantizer in enumerate(attention.activation_quantizers):
                assert isinstance(quantizer, ActivationQuantizer)
                initialize_activations(quantizer, observations[name, index], activations, common)
            seen = observations[name, 3]
            initialize_probabilities(attention.probabilities, seen, activations, common)
            attention.quantizing = True
            task.advance(note=name)
