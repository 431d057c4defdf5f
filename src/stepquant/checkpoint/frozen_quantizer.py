"""Base class of the quantizers that diffusers calls while it loads and saves a model."""

from __future__ import annotations

from typing import Any

from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn


class FrozenQuantizer(DiffusersQuantizer):
    """Quantizer of models with integer codes: they save, load and compile, but do not train."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._owned: set[str] = set()  # names of the tensors that stepquant puts in place

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Tensor],
        **kwargs: Any,
    ) -> bool:
        """Whether stepquant puts the tensor in place; diffusers does it for all others."""
        return param_name in self._owned

    @property
    def is_serializable(self) -> bool:
        """True: these models save and load."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """True: these layers run under `torch.compile`."""
        return True
