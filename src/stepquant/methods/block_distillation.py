"""Block-wise Knowledge Distillation (BKD) of DilateQuant (arXiv 2409.14307), section 4.3.

Blocks are trained one after another, in execution order. With `B_k` the float block and `B̂_k` the
quantized block, block `k` minimises (equation 15)

    L_k = || B_k(... B_1(x)) - B̂_k(... B̂_1(x)) ||^2

The input is the output of the quantized blocks before, the target the output of the float chain.
Weights, weight scales and the step tables of the activations are trained together.

Deviations:

- Learning rates are relative to each quantizer's grid; the published 1e-2 for raw weights is larger
  than many weights.
- The loss is divided by the mean square of the target.
- Biases are trained with the weights.
- Each block keeps the parameters with the lowest loss on held-out samples, so it never ends above
  its initial loss.
- Layers that embed the timestep inside a block are not trained (`trained_layers`).
- `steps_together` above 1 uses a loss of our own (`training.steps_together`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stepquant.calibration.block_inputs import BlockData
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
from stepquant.simulation.scheme import Scheme
from stepquant.support.errors import StepQuantError


@register_step
class BlockDistillation(Step):
    """Train each quantized block to reproduce the output of the float chain.

    The three rates are in grid steps per iteration, before the cosine decay: Adam moves a parameter
    by about its rate.

    Attributes:
        iterations: Optimizer steps per block.
        batch: Samples per optimizer step.
        samples: Calibration inputs in all; an eighth is held out. With `steps_together` above 1
            they are whole trajectories, or some steps of each where conditions differ.
        weight_rate: How far a weight moves.
        scale_rate: How far the end of a weight range moves.
        activation_rate: How far the end of an activation range, and the zero point, moves.
        float_inputs: Take the inputs from the float chain, which makes blocks independent.
        step_order: "mixed" draws batches over all steps. "sequential" gives each batch a single
            step and cycles through the steps in sampling order, as EfficientDM (ICLR 2024) trains,
            for comparison.
        steps_together: Above 1, the loss is of the mean error over that many steps of one
            trajectory (`training.steps_together`, ours); for mixed batches only.
    """

    name = "block_distillation"
    trains = "blocks"
    not_after: ClassVar[Mapping[str, str]] = CORRECTED
    iterations: int = Field(400, ge=0)
    batch: int = Field(32, ge=1)
    samples: int = Field(1024, ge=16)
    weight_rate: float = Field(0.1, ge=0)
    scale_rate: float = Field(0.1, ge=0)
    activation_rate: float = Field(0.1, ge=0)
    float_inputs: bool = False
    step_order: Literal["mixed", "sequential"] = "mixed"
    steps_together: int = Field(1, ge=1)

    def check(self, scheme: Scheme) -> None:
        """Check the settings of the batches.

        Raises:
            StepQuantError: `steps_together` exceeds `batch`, or exceeds 1 with sequential batches.
        """
        check_together(self.name, self.steps_together, self.batch)
        if self.steps_together > 1 and self.step_order != "mixed":
            raise StepQuantError(
                f"step '{self.name}' has step_order {self.step_order} and steps_together "
                f"{self.steps_together}: expected step_order mixed, because several steps together "
                "need mixed batches"
            )

    def apply(self, session: Session) -> None:
        """Distil all blocks; the summary has each block's held-out loss before and after.

        Raises:
            StepQuantError: There are too few calibration inputs, or a loss is not finite.
        """
        session.ensure_ranges()
        data = training_inputs(session, self.name, self.samples, self.steps_together)
        session.summary[self.name] = train_blocks(
            session,
            self.name,
            "distilling blocks",
            data,
            self.batch,
            partial(self._train, session),
            self.float_inputs,
        )

    def _train(
        self,
        session: Session,
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
        if self.iterations == 0:
            return guarded.finish()
        layers = trained_layers(session, name)
        optimizer = LayerOptimizer(
            layers, self.weight_rate, self.scale_rate, self.activation_rate, self.iterations
        )
        if self.step_order == "mixed":
            order = guarded.batches(self.batch, self.iterations, generator)
        else:
            order = self._one_step_each(data.timestep[guarded.train], guarded.train, generator)
        for iteration, index in enumerate(session.reporter.within(order)):
            loss = guarded.loss(index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if is_check(iteration, self.iterations):
                guarded.check()
        return guarded.finish()

    def _one_step_each(
        self, timestep: Tensor, train: Tensor, generator: torch.Generator
    ) -> list[Tensor]:
        """Training indices `[batch]` of each iteration, one step each, in sampling order.

        `train` holds the training indices, `timestep` their timesteps, both `[n]`.
        """
        batches = []
        steps = timestep.unique().flip(0)  # sampling order: from high to low timesteps
        for iteration in range(self.iterations):
            members = train[timestep == steps[iteration % len(steps)]]
            pick = torch.randint(len(members), (self.batch,), generator=generator)
            batches.append(members[pick])
        return batches
