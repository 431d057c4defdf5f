"""Training weights at low rank: EfficientDM, arXiv 2310.03270 (ICLR 2024), section 3.2."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from stepquant.methods.step import Step
from stepquant.quantizers.low_rank import fitted_adapter, zero_adapter
from stepquant.session import Session


class LowRankAdapters(Step):
    """Freeze the weights and give each layer an adapter of `rank`, merged before quantization.

    The steps that follow train the adapters in the place of weights and biases. `start`: "zero",
    as in the paper, or "quantization_error": the part of rank `rank` of what quantization takes
    from the weight (after MPQ-DMv2, arXiv 2507.04290, whose exact rule is not published). A conv's
    adapter is one over in-channels and taps together.
    """

    name = "low_rank_adapters"
    rank: int = Field(32, ge=1)
    start: Literal["zero", "quantization_error"] = "zero"

    def apply(self, session: Session) -> None:
        """Attach the adapters; the summary has how many parameters they train."""
        session.ensure_ranges()
        generator = torch.Generator().manual_seed(session.seed)
        trained = 0
        for layer in session.layers().values():
            matrix = layer.weight.detach().flatten(1)
            if self.start == "zero":
                adapter = zero_adapter(*matrix.shape, self.rank, generator)
            else:
                error = matrix - layer.quantized_weight().detach().flatten(1)
                adapter = fitted_adapter(error, self.rank)
            layer.attach_adapter(adapter)
            trained += sum(parameter.numel() for parameter in adapter.parameters())
        session.summary[self.name] = {"rank": self.rank, "trained_parameters": trained}
