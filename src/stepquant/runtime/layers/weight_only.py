"""Weight-only quantization: linear and conv layers with 8-bit or 4-bit weights, computed in float.

They save memory, not time. They suit models that run once per image (text encoders and VAE) and
denoisers quantized without calibration. They have no step tables.
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
from stepquant.runtime.layers.dtype_marker import MarksDtype, values_of
from stepquant.support.errors import StepQuantError

LARGEST = 127  # 8-bit codes are symmetric around zero
WEIGHT_ONLY_BITS = (4, 8)
AT_ONCE = 1 << 22  # weights to round at a time, which bounds the temporary memory


def weight_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a float `weight [C_out, ...]` to 8 bits, symmetrically per out-channel.

    Returns int8 codes of the same shape, and float32 scales `[C_out]`: the largest magnitude
    divided by 127. An out-channel of zeros gets the scale 1.
    """
    weight = weight.detach().to(torch.float32)
    scale = scale_of(weight.flatten(1).abs().amax(dim=1), LARGEST, inverted=False)
    codes = (weight / scale.view(-1, *(1,) * (weight.dim() - 1))).round()
    return codes.clamp(-LARGEST, LARGEST).to(torch.int8), scale


def weight_only_tensors(
    weight: Tensor, bits: int, find: GridSearch = minmax_weight_range
) -> dict[str, Tensor]:
    """The tensors of a weight-only layer that replace a float `weight [C_out, ...]`, by name.

    `bits`: 8, or 4, for which `find` chooses the grids. The function rounds a few out-channels at a
    time, so that it needs little memory besides the weight and the result. `WeightOnly` describes
    the tensors.
    """
    if bits == 8:
        codes, scale = weight_codes(weight)
        return {"weight": codes.flatten(), "weight_scale": scale}
    rows = weight.detach().flatten(1)
    scale, zero_point = (
        torch.empty(len(rows), dtype=torch.float32, device=weight.device) for _ in range(2)
    )
    step = max(2, AT_ONCE // rows.shape[1] // 2 * 2)  # even: two rows end at a byte boundary
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


class WeightOnly(MarksDtype):
    """Base class of the weight-only layers.

    - `weight`: int8 `[n]`, the codes in the order of the weight `[C_out, ...]`. At 4 bits, each
      byte holds two codes, the first in its low half.
    - `weight_scale`: float32 `[C_out]`.
    - `weight_zero_point`: uint8 `[C_out]` at 4 bits, None at 8.

    The codes are one-dimensional on purpose. In the weight's shape, a library that does not know
    the format would use them as the weight, with a warning at most.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: tuple[int, ...]

    def hold(self, weight_shape: tuple[int, ...], tensors: dict[str, Tensor]) -> None:
        """Store the result of `weight_only_tensors` for a weight of this shape."""
        self.weight_shape = tuple(weight_shape)
        self.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        self.register_buffer("weight_scale", tensors["weight_scale"])
        self.register_buffer("weight_zero_point", tensors.get("weight_zero_point"))

    def float_parameters(self) -> int:
        """The number of parameters of the float layer."""
        bias: Any = self.bias
        return values_of(self.weight_shape, bias)

    def held(self) -> list[Tensor]:
        """The tensors that hold the weight in memory."""
        tensors = [self.weight, self.weight_scale, self.weight_zero_point]
        return [tensor for tensor in tensors if tensor is not None]

    def float_weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight `[C_out, ...]`, computed in float32 and returned in `dtype`."""
        shape = (-1, *(1,) * (len(self.weight_shape) - 1))
        scale = self.weight_scale.view(shape)
        if self.weight_zero_point is None:
            codes = self.weight.view(self.weight_shape).to(torch.float32)
            return (codes * scale).to(dtype)
        nibbles = unpack_nibbles(self.weight.view(torch.uint8), math.prod(self.weight_shape))
        codes = nibbles.view(self.weight_shape).to(torch.float32)
        return dequantize(codes, scale, self.weight_zero_point.view(shape)).to(dtype)

    def bias_for(self, x: Tensor) -> Tensor | None:
        """The bias in the dtype of `x`: blocks may pass float32 to the layers of a bf16 model."""
        bias: Any = self.bias
        return None if bias is None else bias.to(x.dtype)

    def check_floating(self, x: Tensor) -> None:
        """Raise StepQuantError if `x` is not floating point.

        Some models cast their input to the dtype of `weight`, which is int8 here.
        """
        if not x.is_floating_point():
            raise StepQuantError(
                f"a weight-only layer got an input of {x.dtype}: expected floating point; a "
                "model that casts inputs to the weight's dtype cannot be quantized this way"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_scale = tensor is self.weight_scale
            return tensor.to(moved.device) if is_scale and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_float32, recurse)


class WeightOnlyLinear(WeightOnly, nn.Linear):
    """`nn.Linear` that dequantizes its weight in each call."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, in the dtype of `input [..., C_in]`.

        Raises StepQuantError for an input that is not floating point.
        """
        self.check_floating(input)
        return F.linear(input, self.float_weight(input.dtype), self.bias_for(input))


class WeightOnlyConv2d(WeightOnly, nn.Conv2d):
    """`nn.Conv2d` that dequantizes its weight in each call."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv2d`, in the dtype of `input [B, C_in, H, W]`.

        Raises StepQuantError for an input that is not floating point.
        """
        self.check_floating(input)
        return self._conv_forward(input, self.float_weight(input.dtype), self.bias_for(input))


def empty_tensors(weight_shape: tuple[int, ...], bits: int) -> dict[str, Tensor]:
    """As `weight_only_tensors` for a weight of this shape, but on the meta device."""
    out, count = weight_shape[0], packed_size(math.prod(weight_shape), bits)
    kinds = {"weight": (count, torch.int8), "weight_scale": (out, torch.float32)}
    if bits < 8:
        kinds["weight_zero_point"] = (out, torch.uint8)
    return {
        name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in kinds.items()
    }


def check_weight_only_bits(bits: int, what: str) -> int:
    """Return `bits` if weight-only layers support them.

    Raises StepQuantError otherwise; `what` names the setting in the message.
    """
    if bits not in WEIGHT_ONLY_BITS:
        raise StepQuantError(
            f"{what} is {bits!r}: expected one of {', '.join(map(str, WEIGHT_ONLY_BITS))}, the "
            "bits of weight-only layers"
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
    """A weight-only layer that replaces `module`, an `nn.Linear` or `nn.Conv2d`; keeps its bias.

    Args:
        module: The float layer.
        empty: Create the quantized tensors on the meta device, for `load_state_dict`.
        bits: 8 or 4.
        find: Chooses the grids at 4 bits; see `weight_only_tensors`.
        kinds: The classes that replace linear and conv layers.
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
    new.mark(module.weight.dtype)
    if has_bias:
        new.bias = module.bias
    return new.train(module.training)
