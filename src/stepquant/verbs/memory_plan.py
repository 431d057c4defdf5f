"""How much memory a calibration will take, before it starts, from the sizes in its model."""

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
# What one layer's rounded weight and a range search hold besides the weight, in weights.
TEMPORARIES = 6
# Gradient, Adam's two moments, and the best state so far, in parameters.
TRAINING = 4
# Of the inputs and outputs of all layers of a block, what a training step keeps for its gradients:
# the input, the rounded input and a mask of each quantized layer among them.
KEPT_FOR_GRADIENTS = 2.5
# Of the largest layer's input and output, what lives at once in a forward without gradients.
ALIVE = 4
SPILL_SHARE = 32  # a tensor that takes this part of the room for activations goes to the disk
LEAST_SPILL = 16 << 20  # bytes


@dataclass(frozen=True)
class Sizes:
    """Of a denoiser, in numbers of values; activations are those of one sample.

    `parameters` of the whole model, `layer` of its largest layer, `block` of its largest block;
    `sample` of what it is called with; `flow` of the largest input and output of a module without
    children, together; `block_flow` the sum of these in the block where it is largest; `block_rows`
    the largest input and output of a block; `skips` the outputs of all blocks, some of which a
    forward keeps for later. `affine` biases, and as many gains of norms, which is never less than
    there are; `whole_flow` the sum of inputs and outputs of all modules without children.
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
    """Sizes of `model` from a forward of `one`, an input.

    `parameters`: numbers in each of its tensors, by name (`FloatState.sizes`).
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
    """Bytes at the peak: what the process holds already, and what a calibration adds.

    `model`: the simulation and the packed model. `weights`: training and rounding of the largest
    block or layer. `forward`: activations of the samples in flight. `data`: inputs, targets and
    outputs of blocks for all samples, as far as they are kept in memory.
    """

    held: int
    model: int
    weights: int
    forward: int
    data: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.held + self.model + self.weights + self.forward + self.data

    def describe(self) -> str:
        """As the end of a sentence, in GiB."""
        parts = {
            "what is held already": self.held,
            "the simulated and packed model": self.model,
            "training": self.weights,
            "the activations of a batch": self.forward,
            "calibration data": self.data,
        }
        return ", ".join(f"{size / GIB:.2f} for {name}" for name, size in parts.items())


def predict_peak(
    sizes: Sizes, recipe: Recipe, inputs: int, held: int, room: int
) -> tuple[Prediction, int]:
    """The peak of quantizing by `recipe`, and from how many bytes on a tensor goes to the disk.

    `inputs`: of the denoiser for each image and step, two with guidance. `held`: bytes that the
    process holds now; `room`: bytes that it may hold.
    """
    calibration = recipe.calibration
    bits = recipe.scheme.weight_bits / 8
    model = int(sizes.parameters * (FLOAT + bits))
    images = min(calibration.batch, calibration.trajectories) * inputs
    total = calibration.trajectories * calibration.steps * inputs
    of_one = FLOAT * (ALIVE * sizes.flow + sizes.skips // 2)
    forward = images * of_one
    weights = FLOAT * TEMPORARIES * sizes.layer
    captured = FLOAT * 2 * total * sizes.sample  # as recorded, and put in order
    data = 0
    for step in recipe.steps:
        if step.trains == "nothing":
            continue
        # A step of another package may have neither setting; then it may take all at once.
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
    # Where there is not enough room the large ones are spilled.
    return Prediction(held, model, weights, forward, captured + min(data, left)), spilled_from


def check_fits(prediction: Prediction, room: int, what: str, asked: bool) -> None:
    """An error if `prediction` is more than `room`, bytes in all; `asked`: the user set it."""
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
    """What was predicted, and from how many bytes on a tensor goes to the disk."""

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
    """How a calibration of `model`, named `what`, fits in memory.

    `scheduler`: the sampler's. `first`: gives what that first calls the denoiser with. `limit`: GiB
    that the process may hold, or None for all that is free.

    Raises StepQuantError where the prediction is more than that, before anything large is done.
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
