"""Temporal Parallel Quantizer (TPQ) of DilateQuant (arXiv 2409.14307), section 4.2.

Each activation quantizer holds a step table, one scale and one zero point for each of the `T`
sampling steps (equation 13). A batch whose samples are at steps `t_1 .. t_B` gathers the rows
`t_1 .. t_B` (equation 14; `quantizers.activation` implements it), so one backward pass trains the
rows of many steps:

    Delta_X, z_X in R^T
    x̂_i = Delta_X[t_i] (clip(round(x_i / Delta_X[t_i]) + z_X[t_i], 0, 2^b - 1) - z_X[t_i])

Deviation: rows outside the batch must not move. They get no gradient, and the lazy optimizer
(`training.layer_optimizer`) skips them; plain Adam would move them by their momentum.
"""

from __future__ import annotations

from typing import Any, Literal

from stepquant.methods.session import Session
from stepquant.methods.step import Step, register_step


@register_step
class TemporalQuantizer(Step):
    """Give every activation quantizer one row for each step of the calibrated sampler.

    Where attention's products are quantized, the tables of queries, keys, values and probabilities
    get the rows too. This step only allocates rows; the steps that train layers train the rows of
    their activation quantizers.

    Attributes:
        start: "own" initialises each row from the activations of its own step, by the recipe's
            range method. "common" gives all rows the range of all steps together, as EfficientDM
            (ICLR 2024) starts.
    """

    name = "temporal_quantizer"
    needs_ranges = False
    start: Literal["own", "common"] = "own"

    def apply(self, session: Session) -> None:
        """Resize all activation tables to the step grid; the summary has the number of steps.

        Raises:
            StepQuantError: An earlier step has initialised the ranges.
        """
        session.require_no_ranges(self.name)
        session.common_ranges = self.start == "common"
        steps = len(session.context.grid)
        quantizer: Any
        for layer in session.layers().values():
            for quantizer in layer.activation_quantizers:
                quantizer.resize(steps)
        for attention in session.attention().values():
            attention.resize(steps)
        session.summary[self.name] = {"steps": steps}
