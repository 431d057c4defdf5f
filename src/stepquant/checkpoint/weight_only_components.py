"""Weight-only 8-bit components of a pipeline: their config, and loading those of diffusers.

Text encoders are models of transformers, which has a table of quantizers of its own
(`checkpoint.weight_only_text`).
"""

from __future__ import annotations

import json
from enum import Enum
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from stepquant.errors import StepQuantError
from stepquant.models.surgery import replace_modules
from stepquant.runtime.weight_only import WeightOnly, is_plain, weight_only_in_place_of

FORMAT_VERSION = 1


class WeightOnlyMethod(str, Enum):
    """diffusers reads `quant_method.value`."""

    WEIGHT_ONLY = "stepquant_weight_only"


class WeightOnlyConfig(QuantizationConfigMixin):
    """The `quantization_config` of such a component: the names of its 8-bit layers.

    Raises StepQuantError for unknown keys, a newer format version and values of the wrong type.
    """

    def __init__(
        self, layers: list[str] | None = None, format_version: int = FORMAT_VERSION, **more: Any
    ) -> None:
        self.quant_method: Any = WeightOnlyMethod.WEIGHT_ONLY
        if format_version != FORMAT_VERSION:
            raise StepQuantError(
                f"a weight-only component has format version {format_version!r}: expected "
                f"{FORMAT_VERSION}, the only one that this stepquant reads; upgrade stepquant"
            )
        unknown = set(more) - {"quant_method"}
        if unknown:
            raise StepQuantError(
                f"the config of a weight-only component has the unknown key '{min(unknown)}': "
                "expected format_version and layers"
            )
        if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
            raise StepQuantError(
                f"layers of the config of a weight-only component is {layers!r}: expected a list "
                "of names"
            )
        self.format_version, self.layers = format_version, sorted(layers)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The config that `to_dict` wrote."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """JSON values in a fixed order."""
        return {
            "format_version": self.format_version,
            "layers": self.layers,
            "quant_method": self.quant_method.value,
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_dict` as indented JSON."""
        del use_diff
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"WeightOnlyConfig(layers={len(self.layers)})"


class WeightOnlyQuantizer(DiffusersQuantizer):
    """Loads and saves weight-only components of diffusers."""

    requires_calibration = True  # that is, nothing is quantized at load
    quantization_config: WeightOnlyConfig  # type: ignore[assignment]

    def __init__(self, quantization_config: WeightOnlyConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._owned: set[str] = set()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._owned = put_empty_layers(model, self.quantization_config)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        """Codes and scales; diffusers puts the others in place itself."""
        return param_name in self._owned

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
        layer = model.get_submodule(layer_name)
        tensor = state_dict[param_name].contiguous().to(target_device)
        check_tensor(param_name, tensor, getattr(layer, key))
        if key == "weight":
            layer.weight = nn.Parameter(tensor, requires_grad=False)
        else:
            layer.register_buffer(key, tensor)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        check_loaded(model)

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
        """Nothing here hinders `torch.compile`."""
        return True


def register() -> None:
    """Teach diffusers, and transformers if it is installed, to load such components."""
    from diffusers.utils import is_transformers_available, is_transformers_version

    method = WeightOnlyMethod.WEIGHT_ONLY.value
    auto.AUTO_QUANTIZER_MAPPING[method] = WeightOnlyQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = WeightOnlyConfig
    if is_transformers_available() and is_transformers_version(">=", "5.0.0"):
        from stepquant.checkpoint import weight_only_text

        weight_only_text.register()


def quantize_weights(model: Any, what: str) -> None:
    """Put weight-only layers in the place of the linear and conv layers of `model`, for saving too.

    `what`: names it in errors. Layers that share their weight with another module, and subclasses
    of both kinds, stay float. Raises StepQuantError if nothing is left, if the model is quantized
    already, or is of a library that would not load it again.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise StepQuantError(f"{what} is quantized already: expected a float model")
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    names = [
        name
        for name, module in model.named_modules()
        if is_plain(module) and counts[id(module.weight)] == 1
    ]
    if not names:
        raise StepQuantError(f"{what} has no linear or conv layer: expected some to quantize")
    config = WeightOnlyConfig(names)
    quantizer: Any
    if isinstance(model, ModelMixin):
        quantizer = WeightOnlyQuantizer(config)
        model.register_to_config(quantization_config=config)
    else:
        quantizer = _text_quantizer(model, config, what)
        model.config.quantization_config = config
    chosen = set(names)
    replace_modules(
        model, lambda name, module: weight_only_in_place_of(module) if name in chosen else None
    )
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = config.quant_method


def put_empty_layers(model: Any, config: WeightOnlyConfig) -> set[str]:
    """Weight-only layers on the meta device where the config names them; names of their tensors."""
    modules = dict(model.named_modules())
    for name in config.layers:
        if name not in modules or not is_plain(modules[name]):
            found = type(modules[name]).__name__ if name in modules else "nothing"
            raise StepQuantError(
                f"the config of a weight-only component names the layer '{name}', which is {found} "
                f"in {type(model).__name__}: expected its linear and conv layers; the config "
                "belongs to another model"
            )
    chosen = set(config.layers)
    replace_modules(
        model,
        lambda name, module: (
            weight_only_in_place_of(module, empty=True) if name in chosen else None
        ),
    )
    return {f"{name}.{key}" for name in config.layers for key in ("weight", "weight_scale")}


def check_tensor(name: str, tensor: Tensor, wanted: Tensor) -> None:
    """Dtype and shape, before a tensor is put in place."""
    if tensor.dtype != wanted.dtype or tensor.shape != wanted.shape:
        raise StepQuantError(
            f"tensor '{name}' is {tensor.dtype} of shape {list(tensor.shape)}: expected "
            f"{wanted.dtype} of shape {list(wanted.shape)}; the file is damaged or belongs to "
            "another config"
        )


def check_loaded(model: nn.Module) -> None:
    """Every weight-only layer has its codes, and positive finite scales."""
    for name, layer in model.named_modules():
        if not isinstance(layer, WeightOnly):
            continue
        for key, dtype in (("weight", torch.int8), ("weight_scale", torch.float32)):
            tensor = getattr(layer, key)
            if tensor.is_meta or tensor.dtype != dtype:
                raise StepQuantError(
                    f"tensor '{name}.{key}' was loaded as {tensor.dtype} on {tensor.device}: "
                    "expected it as a weight-only component has it; the file is incomplete"
                )
        scale = layer.weight_scale
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            raise StepQuantError(
                f"tensor '{name}.weight_scale' holds numbers that are no scales: expected finite "
                "positive ones; the file is damaged"
            )


def _text_quantizer(model: Any, config: WeightOnlyConfig, what: str) -> Any:
    try:
        from transformers import PreTrainedModel

        from stepquant.checkpoint.weight_only_text import TextWeightOnlyQuantizer
    except ImportError:
        PreTrainedModel = ()  # type: ignore[assignment,misc]
    if not isinstance(model, PreTrainedModel):
        raise StepQuantError(
            f"{what} is {type(model).__name__}: expected a model of diffusers or transformers, "
            "which can be loaded again"
        )
    return TextWeightOnlyQuantizer(config)
