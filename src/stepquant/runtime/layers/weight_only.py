"""Linear and conv layers with 8-bit or 4-bit weights and float arithmetic: smaller, not faster.

For what runs once for each image, text encoders and VAE, and for denoisers that are packed without
calibration. There are no step tables.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepquant.numerics import (
    dequantize,
    pack_bits,
    packed_size,
    quantize,
    scale_of,
    unpack_nibbles,
)
from stepquant.quantizers.weight import GridSearch, minmax_weight_range
from stepquant.support.errors import StepQuantError

LARGEST = 127  # 8-bit codes are symmetric around zero
WEIGHT_ONLY_BITS = (4, 8)
AT_ONCE = 1 << 22  # weights that are rounded at a time: what the memory for it is bounded by


def weight_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of `weight [C_out, ...]` and float32 scales `[C_out]`, largest weight over 127.

    An out-channel of zeros gets the scale 1.
    """
    weight = weight.detach().to(torch.float32)
    scale = scale_of(weight.flatten(1).abs().amax(dim=1), LARGEST, inverted=False)
    codes = (weight / scale.view(-1, *(1,) * (weight.dim() - 1))).round()
    return codes.clamp(-LARGEST, LARGEST).to(torch.int8), scale


def weight_only_tensors(
    weight: Tensor, bits: int, find: GridSearch = minmax_weight_range
) -> dict[str, Tensor]:
    """What a weight-only layer holds in the place of `weight [C_out, ...]`, by its name there.

    `bits`: 8, or 4, whose grids `find` chooses. Rounds few out-channels at a time, so that little
    more memory is needed than the weight and the result take.
    """
    if bits == 8:
        codes, scale = weight_codes(weight)
        return {"weight": codes.flatten(), "weight_scale": scale}
    rows = weight.detach().flatten(1)
    scale, zero_point = (
        torch.empty(len(rows), dtype=torch.float32, device=weight.device) for _ in range(2)
    )
    step = max(2, AT_ONCE // rows.shape[1] // 2 * 2)  # even: codes of two rows end with a byte
    packed = []
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        few = rows[part].to(torch.float32)
        scale[part], zero_point[part] = find(few, bits)
        codes = quantize(few, scale[part, None], zero_point[part, None], bits)
        packed.append(pack_bits(codes.to(torch.uint8), bits))
    return {
        "weight": torch.cat(packed).view(torch.int8).to(weight.device),
        "weight_scale": scale,
        "weight_zero_point": zero_point.to(torch.uint8),
    }


class WeightOnly(nn.Module):
    """What both kinds share: `weight` int8 `[n]`, `weight_scale` float32 `[C_out]`.

    With 4 bits also `weight_zero_point` uint8 `[C_out]`, and each byte of `weight` holds two codes,
    the first one in its low half. The codes lie in one dimension, in the order of the weight
    `[C_out, ...]`: in its shape, a library that does not know the format would take them for the
    weight, with a warning at most.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: tuple[int, ...]

    def hold(self, weight_shape: tuple[int, ...], tensors: dict[str, Tensor]) -> None:
        """Take what `weight_only_tensors` gave for a weight of that shape."""
        self.weight_shape = tuple(weight_shape)
        self.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        self.register_buffer("weight_scale", tensors["weight_scale"])
        self.register_buffer("weight_zero_point", tensors.get("weight_zero_point"))

    def held(self) -> list[Tensor]:
        """The tensors that stand for the weight in memory."""
        tensors = [self.weight, self.weight_scale, self.weight_zero_point]
        return [tensor for tensor in tensors if tensor is not None]

    def float_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for `[C_out, ...]`, computed in float32, in `dtype`."""
        shape = (-1, *(1,) * (len(self.weight_shape) - 1))
        scale = self.weight_scale.view(shape)
        if self.weight_zero_point is None:
            codes = self.weight.view(self.weight_shape).to(torch.float32)
            return (codes * scale).to(dtype)
        nibbles = unpack_nibbles(self.weight.view(torch.uint8), math.prod(self.weight_shape))
        codes = nibbles.view(self.weight_shape).to(torch.float32)
        return dequantize(codes, scale, self.weight_zero_point.view(shape)).to(dtype)

    def check_floating(self, x: Tensor) -> None:
        """An error where a model has cast its input to the dtype of `weight`, which are codes."""
        if not x.is_floating_point():
            raise StepQuantError(
                f"a weight-only layer got an input of {x.dtype}: expected floating point; the "
                "model casts inputs to the dtype of the weight, so it cannot have such layers"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_scale = tensor is self.weight_scale
            return tensor.to(moved.device) if is_scale and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_float32, recurse)


class WeightOnlyLinear(WeightOnly, nn.Linear):
    """`nn.Linear` whose weight is dequantized at each call."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`, in the dtype of `x`."""
        self.check_floating(x)
        return F.linear(x, self.float_weight(x.dtype), self.bias)


class WeightOnlyConv2d(WeightOnly, nn.Conv2d):
    """`nn.Conv2d` whose weight is dequantized at each call."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Conv2d`, in the dtype of `x`."""
        self.check_floating(x)
        return self._conv_forward(x, self.float_weight(x.dtype), self.bias)


def empty_tensors(weight_shape: tuple[int, ...], bits: int) -> dict[str, Tensor]:
    """As `weight_only_tensors` for a weight of that shape, without data, on the meta device."""
    out, count = weight_shape[0], packed_size(math.prod(weight_shape), bits)
    kinds = {"weight": (count, torch.int8), "weight_scale": (out, torch.float32)}
    if bits < 8:
        kinds["weight_zero_point"] = (out, torch.uint8)
    return {
        name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in kinds.items()
    }


def check_weight_only_bits(bits: int, what: str) -> int:
    """`bits` if there are weight-only layers of so many; otherwise an error that names `what`."""
    if bits not in WEIGHT_ONLY_BITS:
        raise StepQuantError(
            f"{what} is {bits!r}: expected one of {', '.join(map(str, WEIGHT_ONLY_BITS))}, the "
            "bits of layers that dequantize their weights on use"
        )
    return bits


Kinds = tuple[type[WeightOnlyLinear], type[WeightOnlyConv2d]]
WEIGHT_ONLY: Kinds = (WeightOnlyLinear, WeightOnlyConv2d)


def weight_only_in_place_of(
    module: nn.Module,
    empty: bool = False,
    bits: int = 8,
    find: GridSearch = minmax_weight_range,
    kinds: Kinds = WEIGHT_ONLY,
) -> WeightOnly:
    """A weight-only layer like `module`, with its weight rounded and its bias as it is.

    `empty`: on the meta device, to be loaded into. `bits`, `find`: see `weight_only_tensors`.
    `kinds`: what linear and conv layers become.
    """
    assert isinstance(module, nn.Linear | nn.Conv2d)
    new: WeightOnly
    has_bias = module.bias is not None
    if isinstance(module, nn.Linear):
        new = kinds[0](module.in_features, module.out_features, has_bias, device="meta")
    else:
        new = kinds[1](
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            module.groups,
            has_bias,
            module.padding_mode,
            device="meta",
        )
    shape = tuple(module.weight.shape)
    tensors = (
        empty_tensors(shape, bits) if empty else weight_only_tensors(module.weight, bits, find)
    )
    new.hold(shape, tensors)
    if has_bias:
        new.bias = module.bias
    return new.train(module.training)
