"""What the quantizers of stepquant share that diffusers calls while it loads and saves a model."""

from __future__ import annotations

from typing import Any

from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn


class FrozenQuantizer(DiffusersQuantizer):
    """Of models that save, load and compile, and have codes, through which nothing is trained."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._owned: set[str] = set()  # names of the tensors that are put in place here

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Tensor],
        **kwargs: Any,
    ) -> bool:
        """Whether stepquant owns the tensor; diffusers puts the others in place itself."""
        return param_name in self._owned

    @property
    def is_serializable(self) -> bool:
        """Such models save and load."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Such layers run under `torch.compile`."""
        return True
