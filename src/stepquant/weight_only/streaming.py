"""Weight-only quantization of one component from disk to disk, a few layers in memory at a time.

The files are byte for byte those that `quantize_weights` and `save_pretrained` would write from the
whole model in memory, in shards of `SHARD_BYTES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path

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
) -> dict[str, int]:
    """Quantize the weights of the component in `source` and write it to the new folder `target`.

    Tensors that stay float keep their dtype. Peak memory is one output shard plus the rounding of
    the largest layer.

    Args:
        source: folder with `config.json` and safetensors files.
        target: the new folder.
        what: name of the component in errors.
        bits: see `quantize_weights`, as for `grids` and `find`.
        grids: name of the search in the config.
        find: search for the grids.
        kept: returns the names of the layers of the empty model that stay float.
        reporter: where progress is shown.
        shard_bytes: largest size of a shard, in bytes.

    Returns:
        The number of quantized `layers`, and of `parameters` in the component.

    Raises:
        StepQuantError: the files do not match the config, or a weight is not finite.
    """
    files = WeightFiles(source)
    model = empty_model(source, what)
    check_files(model, files, what)
    config = resolved(WeightOnlyConfig(bits=bits, grids=grids), model, what, kept(model))
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
    with reporter.task(f"quantizing {what}", total=len(shapes)) as task:
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
    }


class _Source:
    """Tensors of the quantized model by name, computed from the float ones on request."""

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
        self._made: dict[str, Tensor] = {}  # computed, but not yet requested

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
