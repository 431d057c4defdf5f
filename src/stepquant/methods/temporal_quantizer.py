"""Temporal Parallel Quantizer (TPQ): DilateQuant, arXiv 2409.14307, section 4.2.

Each activation quantizer holds a table with one scale and zero point for each sampling step. A
batch gathers the rows of its samples' steps, so that one backward pass trains the rows of many
steps at once (equations 13 and 14; `quantizers.activation` does the gathering). Rows outside the
batch get no gradient and, under a lazy optimizer, do not move.
"""

from __future__ import annotations

from typing import Literal

from stepquant.methods.session import Session
from stepquant.methods.step import Step, register_step


@register_step
class TemporalQuantizer(Step):
    """Give every activation quantizer a row for each step of the calibrated sampler.

    Attention's queries, keys, values and probabilities included, where they are quantized.

    `start`: "own" initialises each row from its own step's activations, by the recipe's range
    method; "common" gives all rows the range of all steps together, as EfficientDM (ICLR 2024)
    starts, from where training moves each. Steps that train, train the rows.
    """

    name = "temporal_quantizer"
    needs_ranges = False
    start: Literal["own", "common"] = "own"

    def apply(self, session: Session) -> None:
        """Resize all activation tables to the step grid."""
        session.require_no_ranges(self.name)
        session.common_ranges = self.start == "common"
        steps = len(session.context.grid)
        for layer in session.layers().values():
            for quantizer in layer.activation_quantizers:
                quantizer.resize(steps)
        for attention in session.attention().values():
            attention.resize(steps)
        session.summary[self.name] = {"steps": steps}
