"""Low-rank adapters of EfficientDM (arXiv 2310.03270, ICLR 2024), section 3.2.

The frozen weight `W` of a layer gets a trainable `B A` of low rank, merged before quantization, so
nothing of it remains at run time:

    Y = Q(X) Q(W + B A)

Deviations:

- A conv's adapter is one matrix over in-channels and taps together.
- Layers of 8 bits have adapters too.
- `start: quantization_error` is not EfficientDM's, see `LowRankAdapters`.
"""

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
    """Freeze the weights and give each layer an adapter, which later steps train.

    They train the adapters in place of weights and biases.

    Attributes:
        rank: Rank of the adapters, capped at each weight's own.
        start: "zero", as in the paper, leaves the weight `W` unchanged. With "quantization_error"
            the frozen weight is `Q(W)` and the adapter the best approximation of `W - Q(W)` of that
            rank. Their sum is `W` except for what the rank cannot hold, and both factors have a
            gradient from the beginning. This is one round of LoftQ (arXiv 2310.08659). MPQ-DMv2
            (arXiv 2507.04290) starts in the same way, but its exact rule is not published.
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
        """Attach the adapters; the summary has the rank and the number of trained parameters."""
        session.ensure_ranges()
        generator = torch.Generator().manual_seed(session.seed)
        trained = 0
        for layer in session.layers().values():
            if self.start == "zero":
                matrix = layer.weight.flatten(1)  # [C_out, K]
                out_channels, columns = matrix.shape
                adapter = zero_adapter(out_channels, columns, self.rank, generator)
            else:
                quantized = layer.quantized_weight()
                adapter = fitted_adapter((layer.weight - quantized).flatten(1), self.rank)
                # The adapter holds the error: added to `W` itself, it would count the error twice.
                layer.weight.copy_(quantized)
            layer.attach_adapter(adapter)
            trained += sum(parameter.numel() for parameter in adapter.parameters())
        session.summary[self.name] = {"rank": self.rank, "trained_parameters": trained}
