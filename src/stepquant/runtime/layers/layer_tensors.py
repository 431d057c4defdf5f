"""The declaration of an integer layer's tensors.

Construction, packing, loading, validation, `quantization_config`, `inspect` and memory sizes all
read `LAYER_TENSORS`. Its order is the order of the layer's buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from stepquant.runtime.ops.layer_spec import LayerSpec


class Values(Enum):
    """The valid values of a tensor; `checkpoint.validate` checks them."""

    ANY = "any"
    SCALES = "finite positive numbers with a finite inverse"
    NUMBERS = "finite numbers"
    ACTIVATION_CODES = "codes of the input's bits"
    WEIGHT_CODES = "codes of each out-channel's bits"
    SWITCHES = "0 or 1"


class Reader(Enum):
    """Code that reads a layer's tensors, besides the layer's own float path.

    A reader refuses layers with a tensor that it does not support.
    """

    CODES = "blocks that hand codes to their layers"
    OPENVINO = "the backend openvino"
    DEQUANTIZED = "the float layer that replaces a dequantized one"


@dataclass(frozen=True)
class LayerSizes:
    """The sizes that determine the shapes of a layer's tensors.

    `spec`: shape and bits of the layer. `splits`: in-channels of each input part. `steps`: rows of
    the step tables.
    """

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
        shape: Computes the shape from the layer's sizes.
        meaning: A description for readers of the code.
        values: The valid values.
        fill: The initial value.
        needed: Whether a layer with this spec has the tensor; None for an optional tensor, which a
            layer has only if its constructor's `optional` names it.
        config_key: For an optional tensor, the key in the layer's entry of `quantization_config`
            that says whether the layer has it. None if the float layer determines that.
        since_format_1: Entries always contain the key. Newer keys appear only if true, so that
            older checkpoints stay byte-identical.
        is_weight: Whether memory sizes count the tensor as part of the weight.
        readers: Code that reads the tensor, besides the layer's own float path.
        why_shape: Explains the shape in the error message about a wrong one.
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
        """A tensor of the right shape and dtype, filled with `fill`."""
        return torch.full(self.shape(sizes), self.fill, dtype=self.dtype)


ALL = frozenset(Reader)


def _packed_bytes(sizes: LayerSizes) -> tuple[int, ...]:
    # Part by part, because the codes of each part end at a byte boundary.
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
    """The names of the tensors that a layer with `spec` and these `optional` tensors has."""
    return [
        name
        for name, tensor in LAYER_TENSORS.items()
        if (name in optional if tensor.needed is None else tensor.needed(spec))
    ]


def not_read(present: Collection[str], reader: Reader) -> list[str]:
    """The names in `present` that `reader` does not support; it must refuse the layer then."""
    return [name for name in present if reader not in LAYER_TENSORS[name].readers]
