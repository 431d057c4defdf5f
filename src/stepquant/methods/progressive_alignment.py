"""Progressively Aligned Reconstruction (PAR): TCAQ-DM, arXiv 2412.16700 (AAAI 2025).

A model is calibrated on what the float sampler meets, but at inference it meets what its own errors
have made of that. So after a first reconstruction the calibration inputs are drawn anew, by the
quantized model through the real sampler, and the blocks are reconstructed again, shorter; and so on
for a number of rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from stepquant.calibration.trajectories import Trajectories
from stepquant.methods.block_reconstruction import ROUNDED, BlockReconstruction, unrounded_weights
from stepquant.methods.session import Session
from stepquant.methods.step import CORRECTED, register_step
from stepquant.methods.training.block_training import training_inputs

FIRST_SEED = 4_000_000  # of the images drawn here, after the session's own


@register_step
class ProgressiveAlignment(BlockReconstruction):
    """Block reconstruction, then `rounds` more on inputs that the quantized model draws itself.

    `rounds`: 0 is block reconstruction alone. `later_iterations`: optimizer steps per block in each
    of them, where `iterations` are those of the first. As many images are drawn as the calibration
    has. The float chain says what a block should give on the new inputs too. Each round starts from
    the codes and tables of the one before; the other settings are block reconstruction's.

    Rounds, iterations, rates and set sizes are not found in the paper: all are choices.
    """

    name = "progressive_alignment"
    not_after: ClassVar[Mapping[str, str]] = {"block_reconstruction": ROUNDED, **CORRECTED}
    rounds: int = Field(2, ge=0)
    later_iterations: int = Field(100, ge=0)

    def apply(self, session: Session) -> None:
        """Reconstruct round by round; the summary has a list of blocks for each round."""
        session.ensure_ranges()
        for layer in session.layers().values():
            layer.merge_adapter()
        weights = unrounded_weights(session)
        data = training_inputs(session, self.name, self.samples, self.steps_together)
        rounds = []
        for number in range(self.rounds + 1):
            step = self
            if number:
                data = self._own_inputs(session, number)
                step = self.model_copy(update={"iterations": self.later_iterations})
            key = f"{self.name}/round-{number}"
            step.reconstruct(session, key, data, weights)
            rounds.append(session.summary.pop(key))
        session.summary[self.name] = rounds

    def _own_inputs(self, session: Session, number: int) -> Trajectories:
        """Inputs that the model meets on its own trajectories, drawn before round `number`."""
        key = f"{self.name}/trajectories-{number}"
        kept = session.work.load(key)
        if kept is not None:
            return Trajectories.from_tensors(kept)
        images = int(session.trajectories.trajectory.max()) + 1
        seed = session.seed + FIRST_SEED + (number - 1) * images
        drawn = session.draw(images, seed, session.model)
        drawn = training_inputs(session, self.name, self.samples, self.steps_together, drawn)
        tensors = drawn.to_tensors()
        session.work.save(key, tensors)
        return Trajectories.from_tensors(tensors)
