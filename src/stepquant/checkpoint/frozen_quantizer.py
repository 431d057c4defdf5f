"""Base class of the quantizers that diffusers calls while it loads and saves a model."""

from __future__ import annotations

from typing import Any

from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from stepquant.checkpoint.casts import allow_all_casts
from stepquant.runtime.layers.adapters import adapters_text, named_adapters
from stepquant.runtime.layers.lora_branch import named_branches
from stepquant.support.errors import StepQuantError

CONFIG_KEYS = ("quantization_config", "_pre_quantization_dtype")  # that a load adds to a config


def check_device_map(device_map: Any) -> None:
    """Refuse a `device_map` of a quantized model that leaves layers on the disk.

    Raises:
        StepQuantError: one of its values is "disk".
    """
    places = device_map if isinstance(device_map, dict) else {}
    on_disk = [name for name, place in places.items() if place == "disk"]
    if on_disk:
        what = f"layers such as '{on_disk[0]}'" if on_disk[0] else "all layers"
        raise StepQuantError(
            f"device_map puts {what} on 'disk': expected devices with memory, because codes are "
            "not read from the disk at each call; allow more max_memory or name other devices"
        )


def check_no_adapters(model: nn.Module) -> None:
    """Check that no layer has a LoRA or an adapter of peft, which dequantizing would lose.

    Raises:
        StepQuantError: one has.
    """
    for name, _, lora, _ in named_branches(model):
        raise StepQuantError(
            f"the layer '{name}' has a branch of the LoRA '{lora}', which a dequantized layer "
            "would lose: expected a model without LoRA; call unload_lora first"
        )
    for name, adapters in named_adapters(model):
        raise StepQuantError(
            f"the layer '{name}' has {adapters_text(adapters)} of peft: expected a model "
            "without them; call unload_lora_weights of the pipeline first"
        )


def check_in_memory(model: nn.Module) -> None:
    """Check that the tensors of `model` are in memory, which dequantizing reads.

    Raises:
        StepQuantError: offloading has taken one away.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise StepQuantError(
                f"the tensor '{name}' of {type(model).__name__} is offloaded: expected all tensors "
                "in memory to dequantize them; call remove_all_hooks of the pipeline first"
            )


class FrozenQuantizer(DiffusersQuantizer):
    """Quantizer of models with integer codes: they save, load and compile, but do not train."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._owned: set[str] = set()  # names of the tensors that stepquant puts in place

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a `device_map` that would leave quantized tensors on the disk.

        Raises:
            StepQuantError: `device_map` has a layer on "disk".
        """
        check_device_map(kwargs.get("device_map"))

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

    def dequantize(self, model: Any) -> Any:
        """Replace the quantized layers of `model` by float ones, in place, and return `model`.

        The float layers hold the dequantized weights in the dtype of the model. Afterwards the
        model is a float model, which can be cast, trained, saved and quantized again.

        Raises:
            StepQuantError: a LoRA is loaded, a tensor is offloaded, or a layer cannot be a float
                layer.
        """
        check_no_adapters(model)
        check_in_memory(model)
        model = super().dequantize(model)
        vars(model).pop("num_parameters", None)
        vars(model).pop("quantization_method", None)
        allow_all_casts(model)
        kept = {key: value for key, value in model.config.items() if key not in CONFIG_KEYS}
        model._internal_dict = type(model.config)(kept)  # a config entry cannot be unregistered
        return model

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
