"""Weight-only quantization of diffusers models: in memory, at load, saving and loading.

Text encoders are models of transformers, which has its own quantizer interface; see
`weight_only.text`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from stepquant.checkpoint.frozen_quantizer import FrozenQuantizer
from stepquant.quantizers.weight import GridSearch, minmax_weight_range
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
    """Diffusers' quantizer for weight-only models.

    It loads and saves quantized models, and quantizes float ones tensor by tensor at load.
    """

    requires_calibration = False
    quantization_config: WeightOnlyConfig  # type: ignore[assignment]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            self._owned = put_layers(model, self.quantization_config, empty=True)
            return
        # A new config, because callers may pass one config for several components.
        self.quantization_config = resolved_at_load(self.quantization_config, model)
        self._owned = {f"{name}.weight" for name in self.quantization_config.names}

    @property
    def supports_parallel_loading(self) -> bool:
        """Whether diffusers may load shards in parallel; not while modules are replaced."""
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
        """Set the tensor `param_name`, quantizing it if the model is float.

        The tensor comes from `state_dict`, because diffusers has cast `param_value` to
        `torch_dtype`.

        Raises:
            StepQuantError: a tensor of a quantized model has another dtype or shape than expected.
        """
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
        model.register_to_config(quantization_config=self.quantization_config)


def quantize_weights(
    model: Any,
    what: str,
    bits: int = 8,
    grids: str | None = None,
    find: GridSearch = minmax_weight_range,
    kept: Collection[str] = (),
) -> None:
    """Replace the linear and conv layers of `model` by weight-only ones, in place.

    `save_pretrained` then writes a quantized model.

    Args:
        model: a float model of diffusers or transformers.
        what: name of the model in errors.
        bits: bits of the weights, 8 or 4.
        grids: name of the search `find` in the config: "minmax" or "mse", or None for 8 bits.
        find: search for the grids of weights with less than 8 bits.
        kept: names of layers that stay float, as do those that share their weight with another
            module and instances of subclasses.

    Raises:
        StepQuantError: no layer is left, the model is quantized already, or its library could not
            load it again.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise StepQuantError(f"{what} is quantized already: expected a float model")
    config = resolved(WeightOnlyConfig(bits=bits, grids=grids), model, what, kept)
    mark_weight_only(model, config, what)
    put_layers(model, config, find=find)


def mark_weight_only(model: Any, config: WeightOnlyConfig, what: str) -> None:
    """Make `save_pretrained` and `save_config` of `model` write `config`.

    Raises:
        StepQuantError: `model`, called `what`, is not one of diffusers or transformers.
    """
    quantizer: Any
    if isinstance(model, ModelMixin):
        quantizer = WeightOnlyQuantizer(config)
        model.register_to_config(quantization_config=config)
    else:
        quantizer = _text_quantizer(model, config, what)
        model.config.quantization_config = config
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = config.quant_method


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
