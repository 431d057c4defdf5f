"""Prediction of a calibration's peak memory from the sizes of its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.trajectories import Trajectories, predict
from stepquant.methods.recipe import Recipe
from stepquant.methods.training.block_training import BYTES_OF_OUTPUTS, BYTES_OF_TARGETS
from stepquant.models.calling import tensors_in
from stepquant.models.hooks import hooked
from stepquant.models.mapped import FloatState
from stepquant.support.errors import StepQuantError
from stepquant.support.process_memory import available_bytes, held_bytes

GIB = 2**30
FLOAT = 4  # bytes
# Copies of a layer's weight in rounding and range search, besides the weight itself.
TEMPORARIES = 6
# Copies of the trained parameters: gradient, Adam's two moments, and the best state so far.
TRAINING = 4
# Memory that a training step keeps for its gradients, relative to the inputs and outputs of all
# layers: for each quantized layer the input, the rounded input and a mask.
KEPT_FOR_GRADIENTS = 2.5
# Memory of a forward without gradients, relative to the largest layer's input and output.
ALIVE = 4
SPILL_SHARE = 32  # a tensor larger than room / SPILL_SHARE for activations goes to disk
LEAST_SPILL = 16 << 20  # bytes; smaller tensors stay in memory


@dataclass(frozen=True)
class Sizes:
    """Sizes of a denoiser in numbers of values; activations are those of one sample.

    Attributes:
        parameters: parameters of the whole model.
        layer: parameters of its largest layer.
        block: parameters of its largest block.
        sample: the input sample.
        flow: largest sum of input and output of a module without children.
        block_flow: sum of these over a block, for the block where it is largest.
        block_rows: largest sum of a block's input and output.
        skips: outputs of all blocks, some of which a forward keeps for later blocks.
        affine: biases and as many gains of norms, an upper bound of both.
        whole_flow: inputs and outputs of all modules without children.
    """

    parameters: int
    layer: int
    block: int = 0
    sample: int = 0
    flow: int = 0
    block_flow: int = 0
    block_rows: int = 0
    skips: int = 0
    affine: int = 0
    whole_flow: int = 0


@torch.no_grad()
def sizes_of(
    model: nn.Module, parameters: dict[str, int], blocks: Sequence[str], one: Trajectories
) -> Sizes:
    """Measure the sizes of `model` in a forward of one input.

    Args:
        model: the denoiser.
        parameters: number of values in each of its tensors, see `FloatState.sizes`.
        blocks: names of the denoiser's blocks.
        one: one input of the denoiser.
    """
    owner: dict[str, str] = {}
    for block in blocks:
        owner |= {name: block for name, _ in model.get_submodule(block).named_modules(prefix=block)}
    flows: dict[str, int] = {}
    rows = dict.fromkeys(blocks, 0)
    outputs = dict.fromkeys(blocks, 0)

    modules = {name: module for name, module in model.named_modules() if name}

    def look(name: str, args: object, kwargs: object, output: object) -> None:
        given = _values(tensors_in((args, kwargs)))
        made = _values(tensors_in(output))
        if name in rows:
            rows[name], outputs[name] = given + made, made
        if not any(True for _ in modules[name].children()):
            flows[name] = flows.get(name, 0) + given + made

    with hooked(modules, after=look):
        predict(model, one)
    in_block = dict.fromkeys(blocks, 0)
    weights = dict.fromkeys(blocks, 0)
    for name, flow in flows.items():
        if name in owner:
            in_block[owner[name]] += flow
    for name, count in parameters.items():
        layer = name.rpartition(".")[0]
        if layer in owner:
            weights[owner[layer]] += count
    return Sizes(
        sum(parameters.values()),
        max(parameters.values(), default=0),
        max(weights.values(), default=0),
        one.sample.numel(),
        max(flows.values(), default=0),
        max(in_block.values(), default=0),
        max(rows.values(), default=0),
        sum(outputs.values()),
        2 * sum(count for name, count in parameters.items() if name.endswith(".bias")),
        sum(flows.values()),
    )


def _values(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


@dataclass(frozen=True)
class Prediction:
    """Predicted bytes at the peak of a calibration.

    Attributes:
        held: memory of the process before the calibration.
        model: the simulation and the packed model.
        weights: training and rounding of the largest block or layer.
        forward: activations of the batch in flight.
        data: inputs, targets and outputs of blocks for all samples, as far as they stay in memory.
    """

    held: int
    model: int
    weights: int
    forward: int
    data: int

    @property
    def peak(self) -> int:
        """Sum of all parts, in bytes."""
        return self.held + self.model + self.weights + self.forward + self.data

    def describe(self) -> str:
        """Return the parts in GiB, as text for a message."""
        parts = {
            "the process so far": self.held,
            "the simulated and packed model": self.model,
            "training": self.weights,
            "the activations of a batch": self.forward,
            "calibration data": self.data,
        }
        return ", ".join(f"{size / GIB:.2f} for {name}" for name, size in parts.items())


def predict_peak(
    sizes: Sizes, recipe: Recipe, inputs: int, held: int, room: int
) -> tuple[Prediction, int]:
    """Predict the peak memory of quantizing by `recipe`.

    Args:
        sizes: sizes of the denoiser.
        recipe: the recipe.
        inputs: inputs of the denoiser per image and step: one, or two with guidance.
        held: bytes that the process holds now.
        room: bytes that the process may hold.

    Returns:
        The prediction, and the size in bytes from which a tensor goes to disk.
    """
    calibration = recipe.calibration
    bits = recipe.scheme.weight_bits / 8
    model = int(sizes.parameters * (FLOAT + bits))
    images = min(calibration.batch, calibration.trajectories) * inputs
    total = calibration.trajectories * calibration.steps * inputs
    of_one = FLOAT * (ALIVE * sizes.flow + sizes.skips // 2)
    forward = images * of_one
    weights = FLOAT * TEMPORARIES * sizes.layer
    captured = FLOAT * 2 * total * sizes.sample  # as recorded, and a sorted copy
    data = 0
    for step in recipe.steps:
        if step.trains == "nothing":
            continue
        # A step of another package may lack these settings; assume that it takes everything.
        batch = getattr(step, "batch", calibration.batch)
        count = {"model": sizes.parameters, "blocks": sizes.block, "affine": sizes.affine}
        trained = TRAINING * count[step.trains]
        weights = max(weights, FLOAT * (trained + TEMPORARIES * sizes.layer))
        if step.trains != "blocks":
            samples = batch * getattr(step, "window", 1)
            flow = FLOAT * samples * int(KEPT_FOR_GRADIENTS * sizes.whole_flow)
            forward = max(forward, flow)
        if step.trains == "blocks":
            flow = FLOAT * batch * int(KEPT_FOR_GRADIENTS * sizes.block_flow)
            forward = max(forward, flow, 2 * batch * of_one)
            samples = FLOAT * min(total, getattr(step, "samples", total))
            kept = min(samples * sizes.skips, BYTES_OF_OUTPUTS + BYTES_OF_TARGETS)
            data = max(data, samples * sizes.block_rows + kept)
    left = max(0, room - held - model - weights - forward - captured)
    spilled_from = max(LEAST_SPILL, left // SPILL_SHARE)
    # Large tensors that do not fit are spilled to disk.
    return Prediction(held, model, weights, forward, captured + min(data, left)), spilled_from


def check_fits(prediction: Prediction, room: int, what: str, asked: bool) -> None:
    """Refuse a calibration of `what` that is predicted to exceed `room`, in bytes.

    `asked` says whether the user set the limit, for the message.

    Raises:
        StepQuantError: the predicted peak exceeds `room`.
    """
    if prediction.peak <= room:
        return
    whence = "the limit that was set" if asked else "what this process holds and what is free"
    raise StepQuantError(
        f"calibrating {what} is predicted to take {prediction.peak / GIB:.2f} GiB of memory at its "
        f"peak ({prediction.describe()}): expected at most {room / GIB:.2f} GiB, {whence}; lower "
        "calibration.batch or the batch of a step, or quantize the weights without calibration "
        "(--recipe weight-only)"
    )


@dataclass(frozen=True)
class Plan:
    """The predicted memory, and the size in bytes from which a tensor goes to disk."""

    prediction: Prediction
    spilled_from: int


def plan_memory(
    model: nn.Module,
    what: str,
    recipe: Recipe,
    blocks: Sequence[str],
    scheduler: Any,
    first: Callable[[], Trajectories],
    limit: float | None,
) -> Plan:
    """Plan the memory of a calibration before it allocates anything large.

    Args:
        model: the float denoiser.
        what: name of the denoiser in errors.
        recipe: the recipe.
        blocks: names of the denoiser's blocks.
        scheduler: the sampler's scheduler.
        first: returns the inputs of the sampler's first call of the denoiser.
        limit: GiB that the process may hold, or None for all free memory.

    Raises:
        StepQuantError: the predicted peak exceeds the limit, or the limit is not above 0.
    """
    if limit is not None and not limit > 0:
        raise StepQuantError(f"the memory limit is {limit!r} GiB: expected a number above 0")
    held = held_bytes()
    room = held + available_bytes() if limit is None else int(limit * GIB)
    counts = FloatState(model).sizes()
    weights = Sizes(sum(counts.values()), max(counts.values(), default=0))
    what = f"{what} with {weights.parameters / 1e6:.1f} M parameters"
    prediction, _ = predict_peak(weights, recipe, 1, held, room)
    check_fits(prediction, room, what, limit is not None)
    inputs = first()
    sizes = sizes_of(model, counts, blocks, inputs.take(slice(0, 1)))
    busy = [step for step in recipe.steps if step.why_idle(scheduler, inputs) is None]
    recipe = recipe.model_copy(update={"steps": tuple(busy)})
    prediction, spilled_from = predict_peak(sizes, recipe, len(inputs), held, room)
    check_fits(prediction, room, what, limit is not None)
    return Plan(prediction, spilled_from)
