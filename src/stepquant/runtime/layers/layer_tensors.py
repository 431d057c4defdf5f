"""The tensors of an integer layer, each declared once.

Construction, packing, loading, validation, `quantization_config`, `inspect` and memory sizes follow
from `LAYER_TENSORS`. Its order is that of the layer's buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from stepquant.runtime.ops.layer_spec import LayerSpec


class Values(Enum):
    """Which values of a tensor are valid; `checkpoint.validate` checks them."""

    ANY = "any"
    SCALES = "finite positive numbers with a finite inverse"
    NUMBERS = "finite numbers"
    ACTIVATION_CODES = "codes of the input's bits"
    WEIGHT_CODES = "codes of each out-channel's bits"
    SWITCHES = "0 or 1"


class Reader(Enum):
    """Code besides the layer's own float path that reads a layer's tensors.

    Each refuses layers that have a tensor which it does not read.
    """

    CODES = "blocks that hand codes to their layers"
    OPENVINO = "the backend openvino"
    DEQUANTIZED = "the float layer that replaces a dequantized one"


@dataclass(frozen=True)
class LayerSizes:
    """What the shapes of a layer's tensors depend on: `spec`, in-channels of parts, table rows."""

    spec: LayerSpec
    splits: tuple[int, ...]
    steps: int

    @property
    def parts(self) -> int:
        """The number of input parts."""
        return len(self.splits)


@dataclass(frozen=True)
class LayerTensor:
    """One tensor of an integer layer.

    Attributes:
        name: Key in the layer's state dict, and name of the attribute.
        dtype: float32 or uint8.
        shape: Its shape.
        meaning: For readers of the code.
        values: Which values are valid.
        fill: The value before the tensor is filled.
        needed: Whether the layer has it, by its spec; None for an optional tensor, which a layer
            has only if its constructor is told.
        config_key: For an optional tensor, the key of the layer's entry in `quantization_config`
            that says whether the layer has it. None if the float layer tells.
        since_format_1: The entry always has the key. Younger keys are there only if true, so that
            older checkpoints keep their bytes.
        is_weight: Part of the weight, which memory sizes count.
        readers: Who reads it besides the layer's own float path.
        why_shape: The reason for its shape, for the error about a wrong one.
    """

    name: str
    dtype: torch.dtype
    shape: Callable[[LayerSizes], tuple[int, ...]]
    meaning: str
    values: Values = Values.ANY
    fill: int = 0
    needed: Callable[[LayerSpec], bool] | None = None
    config_key: str | None = None
    since_format_1: bool = False
    is_weight: bool = False
    readers: frozenset[Reader] = frozenset()
    why_shape: Callable[[LayerSizes], str] = lambda _: ""

    def empty(self, sizes: LayerSizes) -> Tensor:
        """The tensor before it is filled."""
        return torch.full(self.shape(sizes), self.fill, dtype=self.dtype)


ALL = frozenset(Reader)


def _packed_bytes(sizes: LayerSizes) -> tuple[int, ...]:
    # Each part by itself: its codes end with a whole byte.
    parts = (replace(sizes.spec, in_channels=channels) for channels in sizes.splits)
    return (sum(part.packed_bytes for part in parts),)


def _why_packed_bytes(sizes: LayerSizes) -> str:
    spec = sizes.spec
    codes = spec.out_channels * spec.columns
    return f" bytes, which {codes} codes of {spec.mean_weight_bits:g} bits take"


def _per_out_channel(sizes: LayerSizes) -> tuple[int, ...]:
    return sizes.parts, sizes.spec.out_channels


def _step_table(sizes: LayerSizes) -> tuple[int, ...]:
    return sizes.parts, sizes.steps


def _why_step_table(sizes: LayerSizes) -> str:
    return f", that is, input parts x rows of the step table ({sizes.steps})"


def _always(_: LayerSpec) -> bool:
    return True


LAYER_TENSORS: dict[str, LayerTensor] = {
    tensor.name: tensor
    for tensor in (
        LayerTensor(
            "weight_packed",
            torch.uint8,
            _packed_bytes,
            "codes of the parts, one part after another, in the bit order of `numerics.packing`",
            needed=_always,
            is_weight=True,
            readers=ALL,
            why_shape=_why_packed_bytes,
        ),
        LayerTensor(
            "weight_scale",
            torch.float32,
            _per_out_channel,
            "unit of the weight's codes",
            Values.SCALES,
            fill=1,
            needed=_always,
            is_weight=True,
            readers=ALL,
        ),
        LayerTensor(
            "weight_zero_point",
            torch.uint8,
            _per_out_channel,
            "the weight's zero points, doubled if the spec has `half_zero_points`",
            Values.WEIGHT_CODES,
            needed=_always,
            is_weight=True,
            readers=ALL,
        ),
        LayerTensor(
            "channel_bits",
            torch.uint8,
            lambda sizes: (sizes.spec.out_channels,),
            "bits of each out-channel, if they differ",
            needed=lambda spec: spec.channel_counts is not None,
            is_weight=True,
            readers=ALL,
        ),
        LayerTensor(
            "act_scale",
            torch.float32,
            _step_table,
            "scale of the input at each step",
            Values.SCALES,
            fill=1,
            needed=_always,
            readers=ALL,
            why_shape=_why_step_table,
        ),
        LayerTensor(
            "act_zero_point",
            torch.uint8,
            _step_table,
            "zero point of the input at each step",
            Values.ACTIVATION_CODES,
            needed=_always,
            readers=ALL,
            why_shape=_why_step_table,
        ),
        LayerTensor(
            "bias",
            torch.float32,
            lambda sizes: (sizes.spec.out_channels,),
            "added to the result",
            Values.NUMBERS,
            readers=ALL,
        ),
        LayerTensor(
            "step_bias",
            torch.float32,
            lambda sizes: (sizes.steps, sizes.spec.out_channels),
            "added to `bias` at each step",
            Values.NUMBERS,
            config_key="step_bias",
            readers=ALL,
        ),
        LayerTensor(
            "act_channel_scale",
            torch.float32,
            lambda sizes: (sizes.spec.in_channels,),
            "the input is divided by it",
            Values.SCALES,
            fill=1,
            config_key="channel_scale",
            since_format_1=True,
            readers=ALL,
        ),
    )
}

IN_CONFIG = {
    tensor.config_key: tensor for tensor in LAYER_TENSORS.values() if tensor.config_key is not None
}


def names_of(spec: LayerSpec, optional: Collection[str]) -> list[str]:
    """The names of the tensors of a layer with `spec` that also has the `optional` ones."""
    return [
        name
        for name, tensor in LAYER_TENSORS.items()
        if (name in optional if tensor.needed is None else tensor.needed(spec))
    ]


def not_read(present: Collection[str], reader: Reader) -> list[str]:
    """Those of the tensors `present` that `reader` does not read, and must not ignore."""
    return [name for name in present if reader not in LAYER_TENSORS[name].readers]
