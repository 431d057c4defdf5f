"""Block-wise Knowledge Distillation (BKD): DilateQuant, arXiv 2409.14307, section 4.3, equation 15.

Block by block, in execution order: the input is what the already quantized blocks give, the target
is what the float model gives there; weights, weight scales and the step tables of the activations
are trained together to bring the block's output to the target.
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
    GuardedBlock,
    is_check,
    steps_taken,
    train_blocks,
    trained_layers,
    training_inputs,
)
from stepquant.methods.training.layer_optimizer import LayerOptimizer
from stepquant.methods.training.steps_together import check_together
from stepquant.simulation.scheme import Scheme
from stepquant.support.errors import StepQuantError


@register_step
class BlockDistillation(Step):
    """Train each quantized block to give what the float chain gives.

    `iterations`, `batch`, `samples`: optimizer steps per block, samples per step, and calibration
    inputs in all, an eighth of which are held out. `weight_rate`, `scale_rate`,
    `activation_rate`: learning rates in grid steps per iteration: how far Adam moves a weight, the
    end of a weight range, and the end of an activation range (and the zero point) per iteration
    before the cosine decay. `float_inputs`: distil from float inputs, which makes blocks
    independent of one another. `step_order`: "mixed" draws batches over all steps; "sequential"
    gives each batch a single step and walks through the steps in sampling order, over and over, as
    EfficientDM (ICLR 2024) trains, for comparison. `steps_together`: above 1 the loss is of the
    mean error over so many steps of one trajectory (`training.steps_together`, ours), and `samples`
    are whole trajectories, or where conditions differ some steps of each; with mixed batches only.

    Layers that embed the timestep inside a block are not trained (`trained_layers`).

    Deviations: learning rates are relative to each quantizer's grid (the published 1e-2 for raw
    weights is not believable); biases are trained with the weights; each block keeps the
    parameters with the lowest loss on held-out samples and never ends above its initial loss.
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
        """Batches must hold the steps that are taken together, which sequential ones do not."""
        check_together(self.name, self.steps_together, self.batch)
        if self.steps_together > 1 and self.step_order != "mixed":
            raise StepQuantError(
                f"step '{self.name}' has step_order {self.step_order} and steps_together "
                f"{self.steps_together}: expected mixed batches for several steps together"
            )

    def apply(self, session: Session) -> None:
        """Distil all blocks; the summary has the held-out loss of each, before and after."""
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
        """Train `block`; `(held-out loss before, after)`, over the mean square of the target."""
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
        for iteration, index in enumerate(order):
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
        """The training indices of each iteration, in sampling order."""
        batches = []
        steps = timestep.unique().flip(0)  # in sampling order, as the sampler walks
        for iteration in range(self.iterations):
            members = train[timestep == steps[iteration % len(steps)]]
            pick = torch.randint(len(members), (self.batch,), generator=generator)
            batches.append(members[pick])
        return batches
