"""Weight-only quantization of transformers models, such as text encoders.

Import this module only if transformers is installed.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from diffusers.utils import is_transformers_version
from safetensors import safe_open
from transformers.quantizers.base import HfQuantizer

from stepquant.support.errors import StepQuantError
from stepquant.weight_only.config import WeightOnlyConfig
from stepquant.weight_only.model import check_loaded, put_layers, resolved_at_load


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
        with safe_open(path, framework="pt") as file:
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


class TextWeightOnlyQuantizer(HfQuantizer):
    """Transformers' quantizer for weight-only models.

    A quantized model gets empty weight-only layers before loading, so transformers finds their
    tensors by name. It keeps the dtype of scales, because that of the empty ones differs from the
    model's. A float model is loaded first and then quantized as a whole.
    """

    requires_calibration = False

    quantization_config: WeightOnlyConfig  # type: ignore[assignment]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check the version of transformers: older ones call quantizers differently.

        Raises:
            StepQuantError: transformers is older than 5.
        """
        if not is_transformers_version(">=", "5.0.0"):
            raise StepQuantError(
                f"transformers {transformers.__version__} is installed: expected 5 or newer for "
                "weight-only text encoders; pip install 'stepquant[text]'"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            check_counts(kwargs.get("checkpoint_files") or [], self.quantization_config)
            put_layers(model, self.quantization_config, empty=True)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            # A new config, because callers may pass one config for several components.
            config = resolved_at_load(self.quantization_config, model)
            put_layers(model, config)
            self.quantization_config = model.config.quantization_config = config
        check_loaded(model, self.quantization_config)

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
