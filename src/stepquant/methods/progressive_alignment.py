"""Progressively Aligned Reconstruction (PAR) of TCAQ-DM (arXiv 2412.16700, AAAI 2025).

Calibration inputs come from the float sampler, but at inference the quantized model meets inputs
that carry its own errors (exposure bias). PAR aligns the two:

1. Reconstruct the blocks on inputs from the float model's trajectories.
2. Draw new calibration inputs with the quantized model, through the real sampler.
3. Reconstruct the blocks again on these, with fewer iterations.

Steps 2 and 3 are repeated for a number of rounds. Targets always come from the float chain.

The deviations of `block_reconstruction` apply. We did not find the paper's rounds, iterations,
rates and set sizes: all are our choices.
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

FIRST_SEED = 4_000_000  # offset from the session's seed, so that images start from other noise


@register_step
class ProgressiveAlignment(BlockReconstruction):
    """Block reconstruction, then `rounds` more on inputs that the quantized model draws itself.

    Each round draws as many images as the calibration has, and starts from the codes and tables of
    the round before. The other settings are those of `BlockReconstruction`.

    Attributes:
        rounds: Rounds after the first reconstruction; 0 is block reconstruction alone.
        later_iterations: Optimizer steps per block in each of these rounds. `iterations` are those
            of the first reconstruction.
    """

    name = "progressive_alignment"
    not_after: ClassVar[Mapping[str, str]] = {"block_reconstruction": ROUNDED, **CORRECTED}
    rounds: int = Field(2, ge=0)
    later_iterations: int = Field(100, ge=0)

    def apply(self, session: Session) -> None:
        """Reconstruct round by round; the summary has a list of block records for each round.

        Raises:
            StepQuantError: There are too few calibration inputs, or a loss is not finite.
        """
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
        """Inputs from trajectories that the quantized model draws before round `number`.

        The work folder keeps them, so an interrupted run resumes with the same inputs.
        """
        key = f"{self.name}/trajectories-{number}"
        kept = session.work.load(key)
        if kept is not None:
            return Trajectories.from_tensors(kept)
        images = int(session.trajectories.trajectory.max()) + 1
        seed = session.seed + FIRST_SEED + (number - 1) * images
        drawn = session.draw(images, seed, session.model, session.reporter)
        drawn = training_inputs(session, self.name, self.samples, self.steps_together, drawn)
        tensors = drawn.to_tensors()
        session.work.save(key, tensors)
        return Trajectories.from_tensors(tensors)
