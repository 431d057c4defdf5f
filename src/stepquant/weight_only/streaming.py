"""A component's weights from float to packed, from disk to disk, a few layers in memory at a time.

What is written is byte for byte what `quantize_weights` and `save_pretrained` would write of the
whole model in memory, in shards of `SHARD_BYTES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.constants import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from stepquant.models.weight_files import WeightFiles, check_files, empty_model
from stepquant.quantizers.weight import GridSearch
from stepquant.runtime.layers.weight_only import weight_only_tensors
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter
from stepquant.weight_only.config import WeightOnlyConfig
from stepquant.weight_only.model import put_layers, resolved, tensor_keys
from stepquant.weight_only.quantizers import mark_weight_only

SHARD_BYTES = 1 << 30


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
    patterns: Collection[str] = (),
) -> dict[str, Any]:
    """Pack the component in the folder `source` to weight-only layers in the new folder `target`.

    `what` names it in errors; `bits`, `grids`, `find` are as in `quantize_weights`. The layers
    `kept(model)` stay float, and those of the modules that `patterns` name; they keep their dtype.
    Gives the numbers of `layers` and `parameters`, and the reason why each of `left_float` stays
    float. Peak memory is that of one output shard and what rounding the largest layer takes.

    Raises StepQuantError for files that do not fit the config, and for weights that are no numbers.
    """
    files = WeightFiles(source)
    model = empty_model(source, what)
    check_files(model, files, what)
    asked = WeightOnlyConfig(bits=bits, grids=grids, modules_to_not_convert=list(patterns))
    config = resolved(asked, model, what, kept(model))
    mark_weight_only(model, config, what)
    owned = put_layers(model, config, empty=True)
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
    source_of = _Source(files, set(config.names), bits, find, what)
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
        "layers": len(config.names),
        "parameters": files.parameters,
        "left_float": config.float_layers,
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
