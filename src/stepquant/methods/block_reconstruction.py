"""Block reconstruction with learned rounding: BRECQ (ICLR 2021) as Q-Diffusion (ICCV 2023) uses it.

Block by block, in execution order: the input is what the already quantized blocks give, the target
is what the float model gives there. What is learned is whether each weight is rounded down or up
(AdaRound, ICML 2020), and the tables of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stepquant.calibration.block_inputs import BlockData
from stepquant.calibration.observe import quant_layers
from stepquant.calibration.trajectories import Trajectories
from stepquant.methods.session import Session
from stepquant.methods.step import CORRECTED, Step, register_step
from stepquant.methods.training.block_training import (
    GuardedBlock,
    is_check,
    steps_taken,
    train_blocks,
    trained_layers,
    training_inputs,
)
from stepquant.methods.training.layer_optimizer import LayerOptimizer
from stepquant.methods.training.steps_together import check_together
from stepquant.quantizers import QuantLayer
from stepquant.quantizers.rounding import rectified_sigmoid
from stepquant.simulation.scheme import Scheme

FIRST_BETA, LAST_BETA = 20.0, 2.0
# A rounded weight does not say between which two codes the float one lies: `Step.not_after`.
ROUNDED = "which has rounded the weights that it would round"


def rounding_penalty(logits: Tensor, beta: float) -> Tensor:
    """`sum(1 - |2 h(V) - 1|^beta)`, AdaRound's regulariser: zero once each `h` is 0 or 1."""
    return (1 - (2 * rectified_sigmoid(logits) - 1).abs().pow(beta)).sum()


def annealed_beta(iteration: int, iterations: int, warm_up: float) -> float | None:
    """`beta` at `iteration` of `iterations`: from 20 down to 2 in a straight line.

    None in the first `warm_up` (a share of all), which pass without the penalty.
    """
    start = warm_up * iterations
    if iteration < start:
        return None
    done = (iteration - start) / max(iterations - start, 1.0)
    return FIRST_BETA + (LAST_BETA - FIRST_BETA) * done


@register_step
class BlockReconstruction(Step):
    """Learn how the weights of each quantized block are rounded, and its activation tables.

    `iterations`, `batch`, `samples`: optimizer steps per block, samples per step, and calibration
    inputs in all, an eighth of which are held out. `rounding_rate`: learning rate of the variables
    `V` (`h(V)` goes from 0 to 1 over 4.8). `penalty`: the weight `lambda` of the rounding penalty,
    in units of the block's first held-out loss over its number of weights. `warm_up`: share of the
    iterations without the penalty. `activation_rate`: how far the end of an activation range (and
    the zero point) moves per iteration, in grid steps. `activations`: "together" trains the
    activation tables with the rounding; "after" trains them for a quarter of the iterations once
    the rounding is hard. Rates fall along a cosine. `steps_together`: above 1 the loss is of the
    mean error over so many steps of one trajectory (`training.steps_together`, ours), and `samples`
    are whole trajectories, or where conditions differ some steps of each.

    Q-Diffusion's own values: 20,000 iterations for the rounding at the rate 1e-3 and lambda 0.01 on
    a squared error that is summed over channels, 5,000 for the activation scales at 4e-4, batches
    of 32 from 5,120 samples; warm-up 0.2.

    Layers that embed the timestep inside a block are not trained (`trained_layers`).

    Deviations: losses are relative to the power of the target, and so lambda to the first loss, as
    the published one means something else in every block; activations are quantized while the
    rounding is learned, and zero points are trained with their scales; the error of activation
    training is squared, not to the power of 2.4; each block keeps the codes and tables with the
    lowest held-out loss after hard rounding and never ends above its initial loss. Low-rank
    adapters are merged first.
    """

    name = "block_reconstruction"
    trains = "blocks"
    not_after: ClassVar[Mapping[str, str]] = {"progressive_alignment": ROUNDED, **CORRECTED}
    iterations: int = Field(400, ge=0)
    batch: int = Field(32, ge=1)
    samples: int = Field(1024, ge=16)
    rounding_rate: float = Field(0.4, ge=0)
    penalty: float = Field(1000.0, ge=0)
    warm_up: float = Field(0.2, ge=0, le=1)
    activation_rate: float = Field(0.1, ge=0)
    activations: Literal["together", "after"] = "together"
    steps_together: int = Field(1, ge=1)

    def check(self, scheme: Scheme) -> None:
        """Batches must hold the steps that are taken together."""
        check_together(self.name, self.steps_together, self.batch)

    def apply(self, session: Session) -> None:
        """Reconstruct all blocks; the summary has the held-out loss of each, before and after."""
        session.ensure_ranges()
        data = training_inputs(session, self.name, self.samples, self.steps_together)
        for layer in session.layers().values():
            layer.merge_adapter()
        self.reconstruct(session, self.name, data, unrounded_weights(session))

    def reconstruct(
        self,
        session: Session,
        key: str,
        data: Trajectories,
        weights: dict[QuantLayer, Tensor],
    ) -> None:
        """Reconstruct all blocks on `data`, rounding `weights`; the summary goes to `key`.

        A layer's own weight may lie on its grid already, from a reconstruction before this one, and
        then says nothing of where else it could be rounded to; `weights` are those before any.
        """
        records = train_blocks(
            session,
            key,
            "reconstructing blocks",
            data,
            self.batch,
            partial(self._train, session, weights),
        )
        for record in records:
            layers = quant_layers(session.model.get_submodule(record["block"])).values()
            record["rounded_elsewhere"] = rounded_elsewhere(layers, weights)
        session.summary[key] = records

    def _train(
        self,
        session: Session,
        weights: dict[QuantLayer, Tensor],
        name: str,
        block: nn.Module,
        data: BlockData,
        generator: torch.Generator,
    ) -> tuple[float, float]:
        """Train `block`; `(held-out loss before, after)`, over the mean square of the target."""
        steps = steps_taken(session, self.samples, self.steps_together)
        guarded = GuardedBlock(
            session, self.name, name, block, data, self.batch, self.steps_together, steps
        )
        layers = trained_layers(session, name)
        count = sum(layer.weight.numel() for layer in layers)
        strength = self.penalty * guarded.first / count  # lambda

        def penalty(iteration: int) -> Tensor | float:
            beta = annealed_beta(iteration, self.iterations, self.warm_up)
            if beta is None or strength == 0:
                return 0.0
            logits = [rounding.logits for layer in layers for rounding in layer.roundings]
            return strength * torch.stack([rounding_penalty(v, beta) for v in logits]).sum()

        optimize = partial(self._optimize, guarded, layers, generator)
        for layer in layers:
            layer.attach_roundings(weights[layer])
        try:
            together = self.activations == "together"
            rate = self.activation_rate if together else 0.0
            optimize(self.iterations, self.rounding_rate, rate, penalty)
        finally:
            for layer in layers:
                layer.detach_roundings()
        if not together:
            guarded.restore()
            optimize(self.iterations // 4, 0.0, self.activation_rate, lambda _: 0.0)
        return guarded.finish()

    def _optimize(
        self,
        guarded: GuardedBlock,
        layers: list[QuantLayer],
        generator: torch.Generator,
        iterations: int,
        rounding_rate: float,
        activation_rate: float,
        penalty: Callable[[int], Tensor | float],
    ) -> None:
        """Train what `layers` have attached, and check the hard rounding now and then."""
        if iterations == 0:
            return
        optimizer = LayerOptimizer(layers, rounding_rate, 0.0, activation_rate, iterations)
        order = guarded.batches(self.batch, iterations, generator)
        for iteration, index in enumerate(order):
            loss = guarded.loss(index) + penalty(iteration)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if is_check(iteration, iterations):
                for layer in layers:
                    layer.settle_roundings()
                guarded.check()


def unrounded_weights(session: Session) -> dict[QuantLayer, Tensor]:
    """A copy of each layer's weight as it is now, `[C_out, C_in, ...]`."""
    return {layer: layer.merged_weight().detach().clone() for layer in session.layers().values()}


@torch.no_grad()
def rounded_elsewhere(layers: Iterable[QuantLayer], weights: dict[QuantLayer, Tensor]) -> float:
    """Share of the weights of `layers` whose code is not the nearest one to `weights`."""
    moved = count = 0
    for layer in layers:
        nearest = weights[layer].split(layer.splits, dim=1)
        for (_, quantizer, weight), before in zip(layer.parts(), nearest, strict=True):
            moved += int((quantizer.codes(weight) != quantizer.codes(before)).sum())
            count += weight.numel()
    return moved / count
