"""Base class of the quantizers that diffusers calls while it loads and saves a model."""

from __future__ import annotations

from typing import Any

from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from stepquant.checkpoint.architecture import changed
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
    """Check that no layer has a LoRA of stepquant or an adapter of peft, before dequantizing.

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
            f"the layer '{name}' has {adapters_text(adapters)} of peft: expected a model without "
            "them; call unload_lora_weights of the pipeline first"
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
        self.saved_model: Any = None
        """The model that `save_pretrained` writes with this quantizer."""

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
        """True: these models save and load.

        `save_pretrained` asks this before it writes anything. Here the copy of the model's config
        follows what `register_to_config` has changed since the model was quantized or loaded.

        Raises:
            StepQuantError: the changed config describes another model, so that a load would fail.
        """
        model, config = self.saved_model, self.quantization_config
        if isinstance(model, ModelMixin):
            found = changed(model, config.architecture)
            if found:
                self._check_rebuilt(model, ", ".join(f"'{key}'" for key in sorted(found)))
                config.architecture = {**config.architecture, **found}
                # After a load, the model's own config holds another object with the same values.
                model.register_to_config(quantization_config=config)
        return True

    def _check_rebuilt(self, model: Any, keys: str) -> None:
        """Check that a load builds `model` from its config, of which `keys` were changed.

        Raises:
            StepQuantError: the config is not valid, or gives other tensors.
        """
        plain = {key: value for key, value in model.config.items() if key not in CONFIG_KEYS}
        try:
            with init_empty_weights():
                built: Any = type(model).from_config(plain)
        except Exception as error:
            raise StepQuantError(
                f"{type(model).__name__} cannot be built from its config, of which "
                f"register_to_config has changed {keys} ({error}): expected a config that a load "
                "takes; take the change back before saving"
            ) from error
        wanted = {name: list(each.shape) for name, each in self._loadable(built).items()}
        found = {name: list(each.shape) for name, each in model.state_dict().items()}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise StepQuantError(
                    f"the tensor '{name}' of {type(model).__name__} has the shape "
                    f"{found.get(name)}, and {wanted.get(name)} in a model of its config, of which "
                    f"register_to_config has changed {keys}: expected a config that describes the "
                    "model, because a load refuses others; take the change back before saving"
                )

    def _loadable(self, built: Any) -> dict[str, Tensor]:
        """Return the state dict that a load into the float model `built` expects; changes it."""
        raise NotImplementedError

    @property
    def is_trainable(self) -> bool:
        """False: codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """True: these layers run under `torch.compile`."""
        return True
