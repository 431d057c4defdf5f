"""Saving and loading of a packed denoiser that is not a diffusers model.

The checkpoint is a folder `denoiser` with `config.json` and `model.safetensors`, as in a diffusers
folder. It does not say how to build the module: the user's code does that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from stepquant.checkpoint.checksum import CHECKSUM_NAME, checksum, checksum_tensor, tensor_line
from stepquant.checkpoint.config import StepQuantConfig
from stepquant.checkpoint.plugin import StepQuantQuantizer
from stepquant.support.atomic import user_path
from stepquant.support.errors import StepQuantError
from stepquant.support.json_text import read_json
from stepquant.support.safetensors_file import opened
from stepquant.support.work_folder import apart

COMPONENT = "denoiser"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def write_module(model: nn.Module, folder: Path) -> None:
    """Write `model` to the new folder `denoiser` in `folder`, after `attach_config`."""
    quantizer: Any = model.hf_quantizer
    config: StepQuantConfig = quantizer.quantization_config
    part = folder / COMPONENT
    tensors = apart(model.state_dict())
    quantizer.check_saved(tensors)
    part.mkdir()
    lines = [tensor_line(name, tensor) for name, tensor in tensors.items()]
    tensors[CHECKSUM_NAME] = checksum_tensor(checksum(config.layers_json(), lines))
    save_file(tensors, part / WEIGHTS_NAME)
    values = {"_class_name": type(model).__name__, "quantization_config": config.to_dict()}
    (part / CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_module(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load the packed denoiser in `folder` into `model`, a float module built the same way.

    `folder` is the output of `quantize(..., out=folder)` for a `DenoiserPipeline`. The function
    changes `model` in place and returns it in eval mode. The tensors of the file replace all
    tensors of `model`, bit by bit.

    Raises:
        StepQuantError: the folder is absent, damaged or of another module. The message names the
            file, layer or tensor.
    """
    part = user_path(folder) / COMPONENT
    config = _read_config(part / CONFIG_NAME)
    path = part / WEIGHTS_NAME
    quantizer = StepQuantQuantizer(config)
    with opened(path, "the tensors of a packed module") as file:
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    quantizer.maybe_update_loaded_keys(names, [str(path)])
    quantizer._process_model_before_weight_loading(model)
    quantizer.maybe_update_state_dict(tensors)
    for name, tensor in tensors.items():
        if name == CHECKSUM_NAME:
            continue
        if quantizer.check_if_quantized_param(model, tensor, name, tensors):
            quantizer.create_quantized_param(model, tensor, name, "cpu", tensors)
        else:
            _put(model, name, tensor)
    quantizer._process_model_after_weight_loading(model)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    return model.eval()


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a float tensor of `model`, keeping the file's dtype."""
    owner_name, _, key = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if key in owner._parameters:
        owner._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner.register_buffer(key, tensor)


def _read_config(path: Path) -> StepQuantConfig:
    values = read_json(path, "the config of a packed module")
    config = values.get("quantization_config") if isinstance(values, dict) else None
    if not isinstance(config, dict):
        raise StepQuantError(
            f"'{path}' cannot be read as the config of a packed module: expected a folder that "
            "quantize wrote of a DenoiserPipeline"
        )
    try:
        return StepQuantConfig.from_dict(config)
    except TypeError as error:  # a key that is no argument, such as "self"
        raise StepQuantError(
            f"the quantization_config in '{path}' cannot be read ({error}): expected the keys that "
            "quantize writes"
        ) from error
