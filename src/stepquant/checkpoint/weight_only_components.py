"""Weight-only components of a pipeline: making them, and loading those of diffusers.

Text encoders are models of transformers, which has a table of quantizers of its own
(`checkpoint.weight_only_text`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from stepquant.checkpoint.weight_only_config import WeightOnlyConfig, WeightOnlyMethod
from stepquant.errors import StepQuantError
from stepquant.models.surgery import replace_modules
from stepquant.quantizers.weight import GridSearch
from stepquant.runtime.weight_only import (
    WeightOnly,
    is_plain,
    minmax_grid,
    weight_only_in_place_of,
)

TENSORS = {
    "weight": torch.int8,
    "weight_scale": torch.float32,
    "weight_zero_point": torch.uint8,  # below 8 bits
}


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


def quantize_weights(
    model: Any,
    what: str,
    bits: int = 8,
    grids: str | None = None,
    find: GridSearch = minmax_grid,
    kept: Collection[str] = (),
) -> None:
    """Put weight-only layers in the place of the linear and conv layers of `model`, for saving too.

    `what`: names it in errors. `bits`, `find`: see `runtime.weight_only`; `grids` is what the
    config calls `find`. The layers `kept`, those that share their weight with another module, and
    subclasses of both kinds, stay float. Raises StepQuantError if nothing is left, if the model is
    quantized already, or is of a library that would not load it again.
    """
    config = WeightOnlyConfig(weight_only_layers(model, what, kept), bits=bits, grids=grids)
    mark_weight_only(model, config, what)
    chosen = set(config.layers)
    replace_modules(
        model,
        lambda name, module: (
            weight_only_in_place_of(module, bits=bits, find=find) if name in chosen else None
        ),
    )


def weight_only_layers(model: Any, what: str, kept: Collection[str] = ()) -> list[str]:
    """Names of the layers that `quantize_weights` replaces, with its errors."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise StepQuantError(f"{what} is quantized already: expected a float model")
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    names = [
        name
        for name, module in model.named_modules()
        if is_plain(module) and counts[id(module.weight)] == 1 and name not in kept
    ]
    if not names:
        raise StepQuantError(f"{what} has no linear or conv layer: expected some to quantize")
    return names


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
            weight_only_in_place_of(module, empty=True, bits=config.bits)
            if name in chosen
            else None
        ),
    )
    return {f"{name}.{key}" for name in config.layers for key in tensor_keys(config.bits)}


def tensor_keys(bits: int) -> tuple[str, ...]:
    """What a weight-only layer of `bits` bits holds beside its bias."""
    return tuple(TENSORS)[: 3 if bits < 8 else 2]


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
        for key, dtype in TENSORS.items():
            tensor = getattr(layer, key)
            if tensor is None:
                continue
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
        zero_point = layer.weight_zero_point
        if zero_point is not None and bool((zero_point > 15).any()):
            raise StepQuantError(
                f"tensor '{name}.weight_zero_point' holds {int(zero_point.max())}: expected at "
                "most 15, the largest code of 4 bits; the file is damaged"
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
