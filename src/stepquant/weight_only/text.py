"""Weight-only quantization of transformers models, such as text encoders.

Import this module only if transformers is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers.utils import is_transformers_version
from torch import nn
from transformers.quantizers.base import HfQuantizer

from stepquant.checkpoint.architecture import architecture_of, check_architecture
from stepquant.checkpoint.casts import allow_all_casts
from stepquant.checkpoint.checksum import checksum, tensor_line
from stepquant.checkpoint.frozen_quantizer import (
    check_device_map,
    check_in_memory,
    check_no_adapters,
)
from stepquant.checkpoint.quantized_model import adapt_methods
from stepquant.checkpoint.validate import REMEDY
from stepquant.runtime.layers.adapters import check_no_adapter_tensors
from stepquant.runtime.layers.dtype_marker import place_markers
from stepquant.support.errors import StepQuantError
from stepquant.support.safetensors_file import opened
from stepquant.weight_only.config import WeightOnlyConfig
from stepquant.weight_only.model import (
    check_finite,
    check_loaded,
    put_float_layers,
    put_layers,
    resolved_at_load,
    tensor_keys,
)


def check_counts(files: list[str], config: WeightOnlyConfig) -> None:
    """Check that the files hold codes, scales and zero points for as many layers as `config` names.

    Transformers initializes tensors that files lack instead of reporting them. The check counts
    dtypes, because transformers renames the tensors of some models on saving.

    Raises:
        StepQuantError: a count differs, or a file is not a safetensors file.
    """
    beside = ("weight_scale", "weight_zero_point")
    wanted = {"I8": len(config.names), "F32": len(config.names)}
    if config.bits < 8:
        wanted["U8"] = len(config.names)
    found = dict.fromkeys(wanted, 0)
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise StepQuantError(
                f"the checkpoint file '{path}' is not a safetensors file: pickle files are "
                "refused, so save the model with safe_serialization=True"
            )
        with opened(Path(path)) as file:
            for key in file.keys():  # noqa: SIM118
                dtype = file.get_slice(key).get_dtype()
                if key.rpartition(".")[2] in beside or dtype == "I8":
                    found[dtype] = found.get(dtype, 0) + 1
    if files and found != wanted:
        raise StepQuantError(
            f"the files of a weight-only component ('{files[0]}') hold codes and scales of the "
            f"dtypes {found}: expected {wanted}, as its config names {len(config.names)} layers; "
            "the files are damaged or belong to another config"
        )


def codes_digest(model: nn.Module, config: WeightOnlyConfig) -> str:
    """Return the SHA-256 of the config, and of the codes and scales by their names in the model.

    Not of what stays float: its dtype is that of the load.
    """
    lines = [
        tensor_line(f"{name}.{key}", getattr(model.get_submodule(name), key))
        for name in config.names
        for key in tensor_keys(config.bits)
    ]
    return checksum(config.layers_json(), lines).hex()


class TextWeightOnlyQuantizer(HfQuantizer):
    """Transformers' quantizer for weight-only models.

    A quantized model gets empty weight-only layers before loading, so transformers finds their
    tensors by name. It keeps the dtype of scales, because that of the empty ones differs from the
    model's. A float model is loaded first and then quantized as a whole.
    """

    requires_calibration = False

    quantization_config: WeightOnlyConfig  # type: ignore[assignment]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check the version of transformers, as older ones call quantizers differently.

        Raises:
            StepQuantError: transformers is older than 5, or `device_map` has a layer on "disk".
        """
        if not is_transformers_version(">=", "5.0.0"):
            raise StepQuantError(
                f"transformers {transformers.__version__} is installed: expected 5 or newer for "
                "weight-only text encoders; pip install 'stepquant[text]'"
            )
        check_device_map(kwargs.get("device_map"))

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            check_architecture(model, self.quantization_config.architecture)
            check_counts(kwargs.get("checkpoint_files") or [], self.quantization_config)
            put_layers(model, self.quantization_config, empty=True)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            # A new config, because callers may pass one config for several components.
            config = resolved_at_load(self.quantization_config, model)
            put_layers(model, config)
            config.architecture = architecture_of(model)
            self.quantization_config = model.config.quantization_config = config
        config = self.quantization_config
        check_loaded(model, config)
        place_markers(model)
        adapt_methods(model, other_dtypes=True)
        for name, parameter in model.named_parameters():
            check_finite(name, parameter)
        if self.pre_quantized and config.sha256 is not None:
            found = codes_digest(model, config)
            if found != config.sha256:
                raise StepQuantError(
                    f"the codes and scales of {type(model).__name__} have the SHA-256 {found}: "
                    f"expected {config.sha256}, as its config says; {REMEDY}"
                )

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Replace the quantized layers of `model` by float ones, in place, and return `model`.

        The float layers hold the dequantized weights. `dtype` casts all floats of the model; None
        leaves them as they are.

        Raises:
            StepQuantError: a LoRA is loaded, or a tensor is offloaded.
        """
        check_no_adapters(model)
        check_in_memory(model)
        put_float_layers(model)
        self.remove_quantization_config(model)
        vars(model).pop("num_parameters", None)
        allow_all_casts(model)
        return model if dtype is None else model.to(dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Note the model's config and the digest in the config, which transformers writes next.

        Raises:
            StepQuantError: peft has added an adapter.
        """
        check_no_adapter_tensors(model.state_dict())
        self.quantization_config.architecture = architecture_of(model)
        self.quantization_config.sha256 = codes_digest(model, self.quantization_config)
        model.config.quantization_config = self.quantization_config
        return None, {}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the requested `dtype`, that of activations and float parameters."""
        return dtype

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works: it does."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: it cannot, as codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` works on the model: it does."""
        return True
