"""Checkpoint config of one attention with quantized products."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from stepquant.models.attention_processor import ProductsProcessor, why_products_stay_float
from stepquant.numerics import check_bits
from stepquant.quantizers import StepContext
from stepquant.runtime.layers.integer_attention import PackedAttention
from stepquant.support.errors import StepQuantError


@dataclass(frozen=True)
class AttentionConfig:
    """Config of one attention whose products are packed.

    - `bits`: bits of queries, keys and values.
    - `probability_bits`: bits of the probabilities.
    - `steps`: rows of the step tables; 1 for static tables.
    """

    bits: int
    probability_bits: int
    steps: int = 1

    @classmethod
    def from_dict(cls, name: str, values: Any) -> AttentionConfig:
        """Read the config of attention `name` from its JSON object.

        Raises:
            StepQuantError: a value is unknown, missing or of the wrong type.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or set(values) != set(known):
            raise StepQuantError(
                f"attention '{name}' of the quantization config is {values!r}: expected an object "
                f"with {', '.join(known)}"
            )
        for key in ("bits", "probability_bits"):
            check_bits(values[key], f"{key} of attention '{name}' in the quantization config")
        steps = values["steps"]
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise StepQuantError(
                f"steps of attention '{name}' in the quantization config is {steps!r}: expected a "
                "whole number of at least 1"
            )
        return cls(**values)

    @classmethod
    def of(cls, attention: PackedAttention) -> AttentionConfig:
        """Return the config of the packed products `attention`."""
        return cls(attention.bits, attention.probability_bits, attention.steps)

    def to_dict(self) -> dict[str, int]:
        """Return the config as a JSON object."""
        return asdict(self)

    def put_into(self, name: str, module: nn.Module, context: StepContext) -> None:
        """Install packed products without data (on the meta device) in the attention `module`.

        `name` names the attention in errors. `context` is the model's step context.

        Raises:
            StepQuantError: `module` is not diffusers' `Attention` with its plain processor.
        """
        reason = why_products_stay_float(module)
        if reason is not None:
            raise StepQuantError(
                f"attention '{name}' is {reason} in the model: expected diffusers' Attention with "
                "its plain processor, as the quantization config says"
            )
        with torch.device("meta"):
            products = PackedAttention(self.bits, self.probability_bits, self.steps, context)
        module.set_processor(ProductsProcessor(products))  # type: ignore[operator]
