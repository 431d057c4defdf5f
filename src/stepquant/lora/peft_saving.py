"""Saving of a LoRA from a quantized model.

diffusers' `save_lora_adapter` casts the model first, even to no dtype at all, and a quantized model
refuses to be cast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Uncast:
    """Stands for `model` in diffusers' `save_lora_adapter`: casts what is saved, not the model."""

    def __init__(self, model: Any, dtype: torch.dtype | None = None) -> None:
        """Stand for `model`, with the floating-point tensors of its LoRAs in `dtype`, if any."""
        self._model, self._dtype = model, dtype

    def to(self, dtype: torch.dtype | None = None) -> Uncast:
        """Stand for the same model in `dtype`."""
        return Uncast(self._model, dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """The model's tensors by name, those of LoRAs in the dtype."""
        found: dict[str, Tensor] = self._model.state_dict()
        return {
            key: tensor.to(self._dtype) if ".lora_" in key else tensor
            for key, tensor in found.items()
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
