"""Block reconstruction with learned rounding: BRECQ (ICLR 2021) as Q-Diffusion (ICCV 2023) uses it.

Blocks are trained one after another, in execution order. The input is the output of the quantized
blocks before, the target the output of the float chain. Learned rounding (AdaRound, ICML 2020)
chooses for each weight whether it is rounded down or up; the step tables of the activations are
trained as well:

    w_q  = s (clip(floor(w / s + z) + h(V), 0, 2^b - 1) - z)
    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)
    L    = || B_k(...) - B̂_k(...) ||^2 + lambda sum(1 - |2 h(V) - 1|^beta)

`beta` falls from 20 to 2 after a warm-up without the penalty.

Q-Diffusion's own values, for comparison with the defaults here:

- rounding: 20,000 iterations at the rate 1e-3, lambda 0.01 on a squared error that is summed over
  channels, warm-up 0.2,
- activation scales: 5,000 iterations at the rate 4e-4,
- batches of 32 from 5,120 samples.

Deviations:

- Losses are relative to the mean square of the target, and lambda is relative to the first loss;
  the published lambda means something else in every block.
- Activations are quantized while the rounding is learned.
- Zero points are trained with their scales.
- The error of activation training is squared, not raised to the power of 2.4.
- Each block keeps the codes and tables with the lowest held-out loss after hard rounding, so it
  never ends above its initial loss.
- Low-rank adapters are merged first.
- Layers that embed the timestep inside a block are not trained (`trained_layers`).
- `steps_together` above 1 uses a loss of our own (`training.steps_together`).
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
    steps_taken,
    train_blocks,
    trained_layers,
    training_inputs,
)
from stepquant.methods.training.guarded_block import GuardedBlock, is_check
from stepquant.methods.training.layer_optimizer import LayerOptimizer
from stepquant.methods.training.steps_together import check_together
from stepquant.quantizers import QuantLayer
from stepquant.quantizers.rounding import rectified_sigmoid
from stepquant.simulation.scheme import Scheme
from stepquant.support.progress import Reporter

FIRST_BETA, LAST_BETA = 20.0, 2.0
# For `Step.not_after`: a rounded weight no longer tells between which two codes the float one lay.
ROUNDED = "which has rounded the weights that it would round"


def rounding_penalty(logits: Tensor, beta: float) -> Tensor:
    """AdaRound's regulariser `sum(1 - |2 h(V) - 1|^beta)`, a scalar; 0 once each `h` is 0 or 1.

    `logits` are `V`, of any shape.
    """
    return (1 - (2 * rectified_sigmoid(logits) - 1).abs().pow(beta)).sum()


def annealed_beta(iteration: int, iterations: int, warm_up: float) -> float | None:
    """`beta` at `iteration` of `iterations`, which falls linearly from 20 to 2.

    None during the warm-up, the first `warm_up` (0 to 1) of all iterations: they have no penalty.
    """
    start = warm_up * iterations
    if iteration < start:
        return None
    done = (iteration - start) / max(iterations - start, 1.0)
    return FIRST_BETA + (LAST_BETA - FIRST_BETA) * done


@register_step
class BlockReconstruction(Step):
    """Learn the rounding of each quantized block's weights, and train its activation tables.

    All rates fall along a cosine.

    Attributes:
        iterations: Optimizer steps per block.
        batch: Samples per optimizer step.
        samples: Calibration inputs in all; an eighth is held out. With `steps_together` above 1
            they are whole trajectories, or some steps of each where conditions differ.
        rounding_rate: Learning rate of the variables `V`. `h(V)` goes from 0 to 1 as `V` moves by
            4.8.
        penalty: The weight `lambda` of the rounding penalty, in units of the block's first held-out
            loss over its number of weights.
        warm_up: Share of the iterations without the penalty.
        activation_rate: How far the end of an activation range, and the zero point, moves per
            iteration, in grid steps.
        activations: "together" trains the activation tables with the rounding. "after" trains them
            once the rounding is hard, for a quarter of the iterations.
        steps_together: Above 1, the loss is of the mean error over that many steps of one
            trajectory (`training.steps_together`, ours).
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
        """Check the settings of the batches.

        Raises:
            StepQuantError: `steps_together` exceeds `batch`.
        """
        check_together(self.name, self.steps_together, self.batch)

    def apply(self, session: Session) -> None:
        """Reconstruct all blocks; the summary has each block's held-out loss before and after.

        It also has the share of weights that are not rounded to the nearest code.

        Raises:
            StepQuantError: There are too few calibration inputs, or a loss is not finite.
        """
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
        """Reconstruct all blocks on `data` and write their records to `session.summary[key]`.

        Args:
            session: Gives the models; `session.model` changes in place.
            key: Key of the summary, and prefix of the pieces in the work folder.
            data: Calibration inputs.
            weights: Each layer's weight before any reconstruction, `[C_out, C_in, ...]`. The
                layer's own weight may already lie on its grid, after an earlier round, and then no
                longer tells which other code is possible.
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
        """Train `block`; returns its held-out losses `(before, after)`.

        Both are relative to the mean square of the target.
        """
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

        optimize = partial(self._optimize, session.reporter, guarded, layers, generator)
        for layer in layers:
            layer.attach_roundings(weights[layer])
        try:
            together = self.activations == "together"
            weights_end = 1.0 if together else 0.8  # the activations get a quarter as many steps
            rate = self.activation_rate if together else 0.0
            optimize(self.iterations, self.rounding_rate, rate, penalty, (0.0, weights_end))
        finally:
            for layer in layers:
                layer.detach_roundings()
        if not together:
            guarded.restore()
            rate, span = self.activation_rate, (weights_end, 1.0)
            optimize(self.iterations // 4, 0.0, rate, lambda _: 0.0, span)
        return guarded.finish()

    def _optimize(
        self,
        reporter: Reporter,
        guarded: GuardedBlock,
        layers: list[QuantLayer],
        generator: torch.Generator,
        iterations: int,
        rounding_rate: float,
        activation_rate: float,
        penalty: Callable[[int], Tensor | float],
        span: tuple[float, float],
    ) -> None:
        """Train what `layers` have attached, and check the hard rounding at intervals.

        `span`: which part of the block's training this is, from 0 to 1, for progress.
        """
        if iterations == 0:
            return
        optimizer = LayerOptimizer(layers, rounding_rate, 0.0, activation_rate, iterations)
        order = guarded.batches(self.batch, iterations, generator)
        for iteration, index in enumerate(reporter.within(order, span)):
            loss = guarded.loss(index) + penalty(iteration)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if is_check(iteration, iterations):
                for layer in layers:
                    layer.settle_roundings()
                guarded.check()


def unrounded_weights(session: Session) -> dict[QuantLayer, Tensor]:
    """A copy of each layer's current weight, adapter merged, `[C_out, C_in, ...]`."""
    return {layer: layer.merged_weight().detach().clone() for layer in session.layers().values()}


@torch.no_grad()
def rounded_elsewhere(layers: Iterable[QuantLayer], weights: dict[QuantLayer, Tensor]) -> float:
    """Share of the weights of `layers`, 0 to 1, whose code is not the one nearest to `weights`."""
    moved = count = 0
    for layer in layers:
        nearest = weights[layer].split(layer.splits, dim=1)
        for (_, quantizer, weight), before in zip(layer.parts(), nearest, strict=True):
            moved += int((quantizer.codes(weight) != quantizer.codes(before)).sum())
            count += weight.numel()
    return moved / count
