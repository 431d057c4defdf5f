"""Weight-only models of diffusers: quantized in memory or at load, saved and loaded.

Text encoders are models of transformers, which has a table of quantizers of its own
(`weight_only.text`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from stepquant.checkpoint.frozen_quantizer import FrozenQuantizer
from stepquant.quantizers.weight import GridSearch, minmax_weight_range
from stepquant.runtime.layers.dtype_marker import count_as_float, place_markers
from stepquant.support.errors import StepQuantError
from stepquant.weight_only.config import WeightOnlyConfig
from stepquant.weight_only.model import (
    check_loaded,
    check_tensor,
    put_layer,
    put_layers,
    resolved,
    resolved_at_load,
)


class WeightOnlyQuantizer(FrozenQuantizer):
    """Loads and saves such models, and quantizes float ones tensor by tensor while they load."""

    requires_calibration = False
    quantization_config: WeightOnlyConfig  # type: ignore[assignment]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            self._owned = put_layers(model, self.quantization_config, empty=True)
            return
        # The caller's config may serve several components.
        self.quantization_config = resolved_at_load(self.quantization_config, model)
        self._owned = {f"{name}.weight" for name in self.quantization_config.names}

    @property
    def supports_parallel_loading(self) -> bool:
        """Modules are replaced while a float model is loaded."""
        return self.pre_quantized

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: str | int | torch.device,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put the file's own tensor in place: `param_value` is already cast to `torch_dtype`."""
        layer_name, _, key = param_name.rpartition(".")
        tensor = state_dict[param_name].contiguous().to(target_device)
        if not self.pre_quantized:
            put_layer(model, layer_name, tensor, self.quantization_config)
            return
        layer = model.get_submodule(layer_name)
        check_tensor(param_name, tensor, getattr(layer, key))
        if key == "weight":
            layer.weight = nn.Parameter(tensor, requires_grad=False)
        else:
            layer.register_buffer(key, tensor)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        check_loaded(model, self.quantization_config)
        place_markers(model)
        count_as_float(model)
        model.register_to_config(quantization_config=self.quantization_config)


def quantize_weights(
    model: Any,
    what: str,
    bits: int = 8,
    grids: str | None = None,
    find: GridSearch = minmax_weight_range,
    kept: Collection[str] = (),
) -> None:
    """Put weight-only layers in the place of the linear and conv layers of `model`, for saving too.

    `what`: names it in errors. `bits`, `find`: see `layers.weight_only`; `grids` is what the
    config calls `find`. The layers `kept`, those that share their weight with another module, and
    subclasses of both kinds, stay float. Raises StepQuantError if nothing is left, if the model is
    quantized already, or is of a library that would not load it again.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise StepQuantError(f"{what} is quantized already: expected a float model")
    config = resolved(WeightOnlyConfig(bits=bits, grids=grids), model, what, kept)
    mark_weight_only(model, config, what)
    put_layers(model, config, find=find)


def mark_weight_only(model: Any, config: WeightOnlyConfig, what: str) -> None:
    """Make `save_pretrained` and `save_config` of `model` write `config`."""
    quantizer: Any
    if isinstance(model, ModelMixin):
        quantizer = WeightOnlyQuantizer(config)
        model.register_to_config(quantization_config=config)
    else:
        quantizer = _text_quantizer(model, config, what)
        model.config.quantization_config = config
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = config.quant_method
    count_as_float(model)


def _text_quantizer(model: Any, config: WeightOnlyConfig, what: str) -> Any:
    try:
        from transformers import PreTrainedModel

        from stepquant.weight_only.text import TextWeightOnlyQuantizer
    except ImportError:
        PreTrainedModel = ()  # type: ignore[assignment,misc]
    if not isinstance(model, PreTrainedModel):
        raise StepQuantError(
            f"{what} is {type(model).__name__}: expected a model of diffusers or transformers, "
            "which can be loaded again"
        )
    return TextWeightOnlyQuantizer(config)
