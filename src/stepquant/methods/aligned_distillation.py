"""Block distillation on what the quantized model meets: DilateQuant's training, TCAQ-DM's inputs.

On the float model's trajectories a quantized model errs little; on its own it comes to states that
no float trajectory has, errs more there, and some of its images run away altogether. So, as in
progressive reconstruction (TCAQ-DM, arXiv 2412.16700), the calibration inputs are drawn anew by the
quantized model through the real sampler, and the blocks are distilled again (DilateQuant, arXiv
2409.14307, section 4.3), shorter; and so on for a number of rounds.
"""

from __future__ import annotations

from pydantic import Field

from stepquant.methods.block_distillation import BlockDistillation
from stepquant.methods.block_training import own_inputs, training_inputs
from stepquant.session import Session


class AlignedDistillation(BlockDistillation):
    """Block distillation, then `rounds` more on inputs that the quantized model draws itself.

    `rounds`: 0 is block distillation alone. `later_iterations`: optimizer steps per block in each
    of them, where `iterations` are those of the first. `own_share`: the share of each later round's
    inputs that are its own; the others are the calibration's. The float chain says what a block
    should give on all of them. The other settings are block distillation's.

    No paper's: progressive alignment of block distillation instead of AdaRound reconstruction.
    """

    name = "aligned_distillation"
    rounds: int = Field(2, ge=0)
    later_iterations: int = Field(100, ge=0)
    own_share: float = Field(0.5, gt=0, le=1)

    def apply(self, session: Session) -> None:
        """Distil round by round; the summary has a list of blocks for each round."""
        session.ensure_ranges()
        data = training_inputs(session, self.name, self.samples)
        rounds = []
        for number in range(self.rounds + 1):
            step, inputs = self, data
            if number:
                count = max(1, round(self.own_share * len(data)))
                own = own_inputs(session, self.name, number, count)
                inputs = own.and_from(data, len(data) - len(own), session.seed + number)
                step = self.model_copy(update={"iterations": self.later_iterations})
            key = f"{self.name}/round-{number}"
            step.distil(session, key, inputs)
            rounds.append(session.summary.pop(key))
        session.summary[self.name] = rounds
