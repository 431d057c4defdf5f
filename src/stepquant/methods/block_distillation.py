"""Block-wise Knowledge Distillation (BKD): DilateQuant, arXiv 2409.14307, section 4.3, equation 15.

Block by block, in execution order: the input is what the already quantized blocks give, the target
is what the float model gives there; weights, weight scales and the step tables of the activations
are trained together to bring the block's output to the target.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stepquant.calibration.capture import (
    BlockData,
    capture_inputs,
    capture_outputs,
    execution_order,
)
from stepquant.calibration.observe import quant_layers
from stepquant.calibration.trajectories import Trajectories
from stepquant.errors import StepQuantError
from stepquant.methods.layer_optimizer import LayerOptimizer
from stepquant.methods.step import Step
from stepquant.quantizers import QuantLayer
from stepquant.session import Session

BYTES_OF_TARGETS = 512 << 20  # float-chain outputs that are kept at once


class BlockDistillation(Step):
    """Train each quantized block to give what the float chain gives.

    `iterations`, `batch`, `samples`: optimizer steps per block, samples per step, and calibration
    inputs in all, an eighth of which are held out. `weight_rate`, `scale_rate`,
    `activation_rate`: learning rates in grid steps per iteration: how far Adam moves a weight, the
    end of a weight range, and the end of an activation range (and the zero point) per iteration
    before the cosine decay. `float_inputs`: distil from float inputs, which makes blocks
    independent of one another. `step_order`: "mixed" draws batches over all steps; "sequential"
    gives each batch a single step and walks through the steps in sampling order, over and over, as
    EfficientDM (ICLR 2024) trains, for comparison.

    Deviations: learning rates are relative to each quantizer's grid (the published 1e-2 for raw
    weights is not believable); biases are trained with the weights; each block keeps the
    parameters with the lowest loss on held-out samples and never ends above its initial loss.
    """

    name = "block_distillation"
    iterations: int = Field(400, ge=0)
    batch: int = Field(32, ge=1)
    samples: int = Field(1024, ge=16)
    weight_rate: float = Field(0.1, ge=0)
    scale_rate: float = Field(0.1, ge=0)
    activation_rate: float = Field(0.1, ge=0)
    float_inputs: bool = False
    step_order: Literal["mixed", "sequential"] = "mixed"

    def apply(self, session: Session) -> None:
        """Distil all blocks; the summary has the held-out loss of each, before and after."""
        session.ensure_ranges()
        data = session.trajectories.subset(self.samples, session.seed)
        if len(data) < 2:
            raise StepQuantError(
                f"step '{self.name}' has {len(data)} calibration input: expected at least 2, one "
                "to train on and one held out; raise calibration.trajectories or calibration.steps"
            )
        model, float_model = session.model, session.float_model
        names = [
            name
            for name in execution_order(model, session.adapter.blocks(float_model), data)
            if any(layer == name or layer.startswith(name + ".") for layer in session.layers())
        ]
        records = []
        targets: dict[str, Tensor] = {}
        inputs_from = float_model if self.float_inputs else model
        with session.reporter.task("distilling blocks", total=len(names)) as task:
            for index, name in enumerate(names):
                block = model.get_submodule(name)
                key = f"{self.name}/{index:03d}-{name}"
                kept = session.work.load(key)
                if kept is None:
                    if name not in targets:
                        targets = self._targets(float_model, names[index:], data)
                    args, kwargs = capture_inputs(inputs_from, name, data, 2 * self.batch)
                    examples = BlockData(args, kwargs, targets.pop(name), data.timestep)
                    generator = torch.Generator().manual_seed(session.seed * 1009 + index)
                    losses = self._train(session, name, block, examples, generator)
                    session.work.save(key, {**block.state_dict(), "losses": torch.tensor(losses)})
                else:
                    losses = tuple(kept.pop("losses").tolist())
                    block.load_state_dict(kept)
                    targets.pop(name, None)
                records.append({"block": name, "loss_before": losses[0], "loss_after": losses[1]})
                task.advance(note=f"{name} loss {losses[0]:.2e} -> {losses[1]:.2e}")
        session.summary[self.name] = records

    def _targets(self, model: nn.Module, names: list[str], data: Trajectories) -> dict[str, Tensor]:
        """Float outputs of as many of `names` as memory allows, the next one in any case."""
        one = capture_outputs(model, names, data.subset(1, 0), 1)
        chosen: list[str] = []
        total = 0
        for name in names:
            total += one[name].nbytes * len(data)
            if chosen and total > BYTES_OF_TARGETS:
                break
            chosen.append(name)
        return capture_outputs(model, chosen, data, 2 * self.batch)

    def _train(
        self,
        session: Session,
        name: str,
        block: nn.Module,
        data: BlockData,
        generator: torch.Generator,
    ) -> tuple[float, float]:
        """Train `block`; `(held-out loss before, after)`, over the mean square of the target."""
        held_out = torch.arange(len(data) - max(1, len(data) // 8), len(data))
        train = torch.arange(len(data) - len(held_out))
        power = data.target.square().mean().clamp(min=1e-12)
        context = session.context

        def loss_on(index: Tensor) -> Tensor:
            args, kwargs, target, timestep = data.batch(index)
            context.set_timestep(timestep)
            loss = (block(*args, **kwargs) - target).square().mean() / power
            if not torch.isfinite(loss):
                raise StepQuantError(
                    f"the loss of block '{name}' is {loss.item()} in step '{self.name}': expected "
                    "a finite number; lower the learning rates or check the float model"
                )
            return loss

        @torch.no_grad()
        def evaluate() -> float:
            chunks = held_out.split(2 * self.batch)
            return sum(loss_on(chunk).item() * len(chunk) for chunk in chunks) / len(held_out)

        first = best = evaluate()
        if self.iterations == 0:
            return first, best
        best_state = {key: value.clone() for key, value in block.state_dict().items()}
        layers = [block] if isinstance(block, QuantLayer) else list(quant_layers(block).values())
        optimizer = LayerOptimizer(
            layers, self.weight_rate, self.scale_rate, self.activation_rate, self.iterations
        )
        order = self._batches(data.timestep[train], train, generator)
        every = max(1, self.iterations // 8)
        for iteration, index in enumerate(order):
            loss = loss_on(index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (iteration + 1) % every == 0 or iteration + 1 == self.iterations:
                now = evaluate()
                if now < best:
                    best = now
                    best_state = {k: v.clone() for k, v in block.state_dict().items()}
        block.load_state_dict(best_state)
        for parameter in block.parameters():
            parameter.grad = None
        return first, best

    def _batches(self, timestep: Tensor, train: Tensor, generator: torch.Generator) -> list[Tensor]:
        """The training indices of each iteration."""
        if self.step_order == "mixed":
            return [
                train[torch.randint(len(train), (self.batch,), generator=generator)]
                for _ in range(self.iterations)
            ]
        batches = []
        steps = timestep.unique().flip(0)  # in sampling order, as the sampler walks
        for iteration in range(self.iterations):
            members = train[timestep == steps[iteration % len(steps)]]
            pick = torch.randint(len(members), (self.batch,), generator=generator)
            batches.append(members[pick])
        return batches
