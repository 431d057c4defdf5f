"""Linear and conv layers with 8-bit weights and float arithmetic: they save memory, not time.

For what runs once for each image, text encoders and VAE, and has no step tables.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepquant.errors import StepQuantError

LARGEST = 127  # codes are symmetric around zero


def weight_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of `weight [C_out, ...]` and float32 scales `[C_out]`, largest weight over 127.

    An out-channel of zeros gets the scale 1.
    """
    weight = weight.detach().to(torch.float32)
    largest = weight.flatten(1).abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    codes = (weight / scale.view(-1, *(1,) * (weight.dim() - 1))).round()
    return codes.clamp(-LARGEST, LARGEST).to(torch.int8), scale


class WeightOnly(nn.Module):
    """What both kinds share: `weight` int8, `weight_scale` float32 `[C_out]`.

    The codes lie in one dimension, in the order of the weight `[C_out, ...]`: in its shape, a
    library that does not know the format would take them for the weight, with a warning at most.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_shape: tuple[int, ...]

    def hold(self, codes: Tensor, scale: Tensor) -> None:
        """Take these codes `[C_out, ...]` and scales."""
        self.weight_shape = tuple(codes.shape)
        self.weight = nn.Parameter(codes.flatten(), requires_grad=False)
        self.register_buffer("weight_scale", scale)

    def float_weight(self, dtype: torch.dtype) -> Tensor:
        """Codes by scales `[C_out, ...]`, multiplied in float32, in `dtype`."""
        scale = self.weight_scale.view(-1, *(1,) * (len(self.weight_shape) - 1))
        return (self.weight.view(self.weight_shape).to(torch.float32) * scale).to(dtype)

    def check_floating(self, x: Tensor) -> None:
        """An error where a model has cast its input to the dtype of `weight`, which are codes."""
        if not x.is_floating_point():
            raise StepQuantError(
                f"a layer with 8-bit weights got {x.dtype}: expected floating-point numbers; the "
                "model casts them to the dtype of the weight, so it cannot have such layers"
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


def is_plain(module: nn.Module) -> bool:
    """Whether `weight_only_in_place_of` takes the module: no subclass, which may do anything."""
    return type(module) in (nn.Linear, nn.Conv2d)


Kinds = tuple[type[WeightOnlyLinear], type[WeightOnlyConv2d]]
WEIGHT_ONLY: Kinds = (WeightOnlyLinear, WeightOnlyConv2d)


def weight_only_in_place_of(
    module: nn.Module, empty: bool = False, kinds: Kinds = WEIGHT_ONLY
) -> WeightOnly:
    """A weight-only layer like `module`, with its weight rounded and its bias as it is.

    `empty`: on the meta device, to be loaded into. `kinds`: what linear and conv layers become.
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
    if empty:
        shape = module.weight.shape
        codes = torch.empty(shape, dtype=torch.int8, device="meta")
        new.hold(codes, torch.empty(shape[0], dtype=torch.float32, device="meta"))
    else:
        new.hold(*weight_codes(module.weight))
    if has_bias:
        new.bias = module.bias
    return new.train(module.training)
