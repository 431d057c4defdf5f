"""A component's weights from float to packed, from disk to disk, a few layers in memory at a time.

What is written is byte for byte what `quantize_weights` and `save_pretrained` would write of the
whole model in memory, in shards of `SHARD_BYTES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.utils.constants import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from stepquant.checkpoint.weight_files import REMEDY, WeightFiles
from stepquant.checkpoint.weight_only_components import (
    mark_weight_only,
    put_empty_layers,
    tensor_keys,
    weight_only_layers,
)
from stepquant.checkpoint.weight_only_config import WeightOnlyConfig
from stepquant.errors import StepQuantError
from stepquant.progress import Reporter
from stepquant.quantizers.weight import GridSearch
from stepquant.runtime.weight_only import weight_only_tensors

SHARD_BYTES = 1 << 30


def empty_model(folder: Path, what: str) -> Any:
    """The diffusers model that `folder/config.json` describes, on the meta device; `what` names it.

    Raises StepQuantError where that is no class of diffusers, or the model is quantized.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        name = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StepQuantError(
            f"'{path}' cannot be read as the config of {what} ({error!r}): expected that of a "
            "model of diffusers, the only kind that is packed without being loaded"
        ) from error
    kind: Any = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise StepQuantError(
            f"{what} is of the class {name}: expected a model class of the installed diffusers"
        )
    if "quantization_config" in config:
        raise StepQuantError(f"{what} is quantized already: expected a float model")
    with init_empty_weights():
        model: Any = kind.from_config(config)  # type: ignore[attr-defined]
    return model.eval()


def check_files(model: nn.Module, files: WeightFiles, what: str) -> None:
    """The files hold each tensor of `model` in its shape, as floats, and no other."""
    wanted = model.state_dict()
    for names, problem in (
        (wanted.keys() - files.meta.keys(), "lack the tensor"),
        (files.meta.keys() - wanted.keys(), "hold the unexpected tensor"),
    ):
        if names:
            raise StepQuantError(
                f"the files of {what} {problem} '{min(names)}': expected exactly the tensors that "
                f"its config.json describes; {REMEDY}"
            )
    for name, tensor in files.meta.items():
        if tensor.shape != wanted[name].shape or not tensor.is_floating_point():
            raise StepQuantError(
                f"tensor '{name}' of {what} is {tensor.dtype} of shape {list(tensor.shape)}: "
                f"expected floats of shape {list(wanted[name].shape)}; {REMEDY}"
            )


def stream_weights(
    source: Path,
    target: Path,
    what: str,
    bits: int,
    grids: str | None,
    find: GridSearch,
    kept: Callable[[nn.Module], Collection[str]],
    reporter: Reporter,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, int]:
    """Pack the component in the folder `source` to weight-only layers in the new folder `target`.

    `what` names it in errors; `bits`, `grids`, `find` are as in `quantize_weights`, and
    `kept(model)` gives the layers that stay float. What stays float keeps its dtype. Gives the
    numbers of `layers` and `parameters`. Peak memory is that of one output shard and what rounding
    the largest layer takes.

    Raises StepQuantError for files that do not fit the config, and for weights that are no numbers.
    """
    files = WeightFiles(source)
    model = empty_model(source, what)
    check_files(model, files, what)
    config = WeightOnlyConfig(weight_only_layers(model, what, kept(model)), bits=bits, grids=grids)
    mark_weight_only(model, config, what)
    owned = put_empty_layers(model, config)
    shapes = {
        name: tensor if name in owned else files.meta[name]
        for name, tensor in model.state_dict().items()
    }
    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern=pattern, max_shard_size=shard_bytes
    )
    target.mkdir(parents=True)
    model.save_config(target)
    source_of = _Source(files, set(config.layers), bits, find, what)
    with reporter.task(f"packing {what}", total=len(shapes)) as task:
        for file_name, members in split.filename_to_tensors.items():
            shard: dict[str, Tensor] = {}
            for name in members:
                shard[name] = source_of(name)
                task.advance(note=name)
            save_file(shard, target / file_name, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (target / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
    return {
        "layers": len(config.layers),
        "parameters": sum(tensor.numel() for tensor in files.meta.values()),
    }


class _Source:
    """Tensors of the packed model by name, made of the float ones when they are asked for."""

    def __init__(
        self,
        files: WeightFiles,
        layers: set[str],
        bits: int,
        find: GridSearch,
        what: str,
    ) -> None:
        self._files, self._layers, self._bits, self._find = files, layers, bits, find
        self._what = what
        self._made: dict[str, Tensor] = {}  # of a layer whose tensors are not all asked for yet

    @torch.no_grad()
    def __call__(self, name: str) -> Tensor:
        layer, _, key = name.rpartition(".")
        if layer not in self._layers or key not in tensor_keys(self._bits):
            return self._read(name).clone()  # the clone outlives the mapping
        if name not in self._made:
            made = weight_only_tensors(self._read(f"{layer}.weight"), self._bits, self._find)
            self._made |= {f"{layer}.{part}": tensor for part, tensor in made.items()}
        return self._made.pop(name)

    def _read(self, name: str) -> Tensor:
        tensor = self._files.read(name)
        if not bool(torch.isfinite(tensor).all()):
            raise StepQuantError(
                f"parameter '{name}' of {self._what} holds NaN or infinity: expected finite "
                "weights; check the model's files"
            )
        return tensor
