"""Weight-only models of transformers, such as text encoders.

Only imported where transformers is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from stepquant.checkpoint.weight_only_components import (
    check_loaded,
    put_empty_layers,
)
from stepquant.checkpoint.weight_only_config import WeightOnlyConfig, WeightOnlyMethod
from stepquant.errors import StepQuantError


def register() -> None:
    """Teach transformers the method."""
    method = WeightOnlyMethod.WEIGHT_ONLY.value
    auto.AUTO_QUANTIZER_MAPPING[method] = TextWeightOnlyQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = WeightOnlyConfig


def check_counts(files: list[str], config: WeightOnlyConfig) -> None:
    """As many codes and scales as layers: transformers would make up what the files lack.

    Not by name: transformers renames the tensors of some models on their way to the disk.
    """
    beside = ("weight_scale", "weight_zero_point")
    wanted = {"I8": len(config.layers), "F32": len(config.layers)}
    if config.bits < 8:
        wanted["U8"] = len(config.layers)
    found = dict.fromkeys(wanted, 0)
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise StepQuantError(
                f"the checkpoint file '{path}' is not a safetensors file: pickle files are "
                "refused, so save the model with safe_serialization=True"
            )
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                dtype = file.get_slice(key).get_dtype()
                if key.rpartition(".")[2] in beside or dtype == "I8":
                    found[dtype] = found.get(dtype, 0) + 1
    if files and found != wanted:
        raise StepQuantError(
            f"the files of a weight-only component ('{files[0]}') hold codes and scales of the "
            f"dtypes {found}: expected {wanted}, as its config names {len(config.layers)} layers; "
            "the files are damaged or belong to another config"
        )


class TextWeightOnlyQuantizer(HfQuantizer):
    """Loads and saves weight-only models of transformers.

    The tensors are in the model before it is loaded into, so transformers finds them by name, and
    keeps the dtype of scales because that of the empty ones differs from the model's.
    """

    requires_calibration = True  # that is, nothing is quantized at load

    quantization_config: WeightOnlyConfig  # type: ignore[assignment]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        check_counts(kwargs.get("checkpoint_files") or [], self.quantization_config)
        put_empty_layers(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        check_loaded(model)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """As asked for: it is that of activations and float parameters."""
        return dtype

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
