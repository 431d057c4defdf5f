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

from stepquant.checkpoint.architecture import architecture_of, check_architecture
from stepquant.checkpoint.checksum import (
    CHECKSUM_NAME,
    FileChecksum,
    checksum,
    checksum_tensor,
    tensor_line,
)
from stepquant.checkpoint.frozen_quantizer import FrozenQuantizer
from stepquant.checkpoint.quantized_model import adapt_methods
from stepquant.checkpoint.validate import REMEDY
from stepquant.checkpoint.validate import check_names as check_tensor_names
from stepquant.quantizers.weight import GridSearch, minmax_weight_range
from stepquant.runtime.layers.adapters import check_no_adapter_tensors
from stepquant.runtime.layers.dtype_marker import place_markers
from stepquant.support.errors import StepQuantError
from stepquant.weight_only.config import WeightOnlyConfig
from stepquant.weight_only.model import (
    check_finite,
    check_loaded,
    check_tensor,
    put_float_layers,
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

    def __init__(self, quantization_config: WeightOnlyConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._checksum = FileChecksum()  # these three only while a model is loaded
        self._loaded_keys: list[str] = []
        self._expected: dict[str, Tensor] = {}

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        """Keep the names for the check, and hide the checksum from diffusers."""
        self._loaded_keys = list(loaded_keys)
        return [key for key in loaded_keys if key != CHECKSUM_NAME]

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Check each tensor as it is in the file, before diffusers casts it.

        Raises:
            StepQuantError: a tensor is unexpected, or has another dtype or shape than expected.
        """
        if self.pre_quantized:
            check_tensor_names(self._loaded_keys, {*self._loaded_keys, *state_dict})
            for name, tensor in state_dict.items():
                if name != CHECKSUM_NAME:
                    check_tensor(name, tensor, self._expected[name])
                self._checksum.take(name, tensor)
        return state_dict

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            check_architecture(model, self.quantization_config.architecture)
            self._owned = put_layers(model, self.quantization_config, empty=True)
            self._expected = dict(model.state_dict())
            # Folders from before there was a checksum have neither it nor the architecture.
            newer = self.quantization_config.architecture is not None
            check_tensor_names(
                [*self._expected, *([CHECKSUM_NAME] if newer else ())], self._loaded_keys
            )
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
        if key == "weight":
            layer.weight = nn.Parameter(tensor, requires_grad=False)
        else:
            layer.register_buffer(key, tensor)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        check_loaded(model, config)
        place_markers(model)
        adapt_methods(model, other_dtypes=True)
        if not self.pre_quantized:
            config.architecture = architecture_of(model)
        elif config.architecture is not None:
            self._checksum.check(config.layers_json(), REMEDY)
        self._checksum, self._loaded_keys, self._expected = FileChecksum(), [], {}
        model.register_to_config(quantization_config=config)
        self.saved_model = model

    def _loadable(self, built: Any) -> dict[str, Tensor]:
        put_layers(built, self.quantization_config, empty=True)
        return built.state_dict()

    def _dequantize(self, model: Any) -> Any:
        put_float_layers(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors that `save_pretrained` writes, with the checksum, and no metadata.

        Raises:
            StepQuantError: a tensor holds NaN or infinity, which a load would refuse, or peft has
                added an adapter.
        """
        check_no_adapter_tensors(state_dict)
        config = self.quantization_config
        if config.architecture is None:  # loaded from an older folder
            return state_dict, {}
        lines = []
        for name, tensor in state_dict.items():
            check_finite(name, tensor)
            lines.append(tensor_line(name, tensor))
        digest = checksum(config.layers_json(), lines)
        return {**state_dict, CHECKSUM_NAME: checksum_tensor(digest)}, {}


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
    config.architecture = architecture_of(model)
    if isinstance(model, ModelMixin):
        quantizer = WeightOnlyQuantizer(config)
        quantizer.saved_model = model
        model.register_to_config(quantization_config=config)
    else:
        quantizer = _text_quantizer(model, config, what)
        model.config.quantization_config = config
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = config.quant_method
    adapt_methods(model, other_dtypes=True)


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
