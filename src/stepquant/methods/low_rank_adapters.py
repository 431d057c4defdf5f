"""Training weights at low rank: EfficientDM, arXiv 2310.03270 (ICLR 2024), section 3.2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from stepquant.methods.session import Session
from stepquant.methods.step import CORRECTED, TRAINING, Step, register_step
from stepquant.quantizers.low_rank import fitted_adapter, zero_adapter


@register_step
class LowRankAdapters(Step):
    """Freeze the weights and give each layer an adapter of `rank`, merged before quantization.

    The steps that follow train the adapters in the place of weights and biases. `start`: "zero",
    as in the paper, leaves the weight `W` as it is; with "quantization_error" the frozen weight is
    `Q(W)` and the adapter the best approximation of `W - Q(W)` of rank `rank`, so that their sum is
    `W` up to what that rank cannot hold, and the gradients of both factors are alive from the
    beginning (LoftQ, arXiv 2310.08659, of one round; MPQ-DMv2, arXiv 2507.04290, begins alike, but
    its exact rule is not published). The rank is at most the weight's own.

    Deviations: a conv's adapter is one matrix over in-channels and taps together; layers of 8 bits
    have adapters too.
    """

    name = "low_rank_adapters"
    not_after: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(TRAINING, "which has trained the weights that it would freeze"),
        **CORRECTED,
    }
    rank: int = Field(32, ge=1)
    start: Literal["zero", "quantization_error"] = "zero"

    @torch.no_grad()
    def apply(self, session: Session) -> None:
        """Attach the adapters; the summary has how many parameters they train."""
        session.ensure_ranges()
        generator = torch.Generator().manual_seed(session.seed)
        trained = 0
        for layer in session.layers().values():
            if self.start == "zero":
                matrix = layer.weight.flatten(1)  # [C_out, K]
                adapter = zero_adapter(*matrix.shape, self.rank, generator)
            else:
                quantized = layer.quantized_weight()
                adapter = fitted_adapter((layer.weight - quantized).flatten(1), self.rank)
                # The adapter is the error's; on top of the weight itself it would add it twice.
                layer.weight.copy_(quantized)
            layer.attach_adapter(adapter)
            trained += sum(parameter.numel() for parameter in adapter.parameters())
        session.summary[self.name] = {"rank": self.rank, "trained_parameters": trained}
