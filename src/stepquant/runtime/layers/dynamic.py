"""Dynamic quantization: linear and conv layers with 8-bit weights and activations.

Each call computes the activation scales, so these layers need neither calibration nor step tables.
A float model can be quantized with them while it loads. They run on the integer layers' kernels,
and their sums are exact integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepquant.numerics import scale_of
from stepquant.runtime.kernels import Kernel, State, choose
from stepquant.runtime.layers.packed_weight import PREPARING
from stepquant.runtime.layers.straight_through import (
    gradient_of_input,
    straight_through,
    wants_gradient,
)
from stepquant.runtime.layers.weight_only import (
    LARGEST,
    WeightOnly,
    WeightOnlyConv2d,
    WeightOnlyLinear,
)
from stepquant.runtime.ops.layer_spec import LayerSpec

ZERO = (
    128  # code of zero: symmetric grids, the one zero point that all tokens can share in a kernel
)


def dynamic_codes(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Quantize `x` symmetrically, with one scale for each slice over `dims`.

    `x ~ (codes - 128) * scale`. The largest magnitude of a slice gets the code 1 or 255; a slice
    of zeros gets the scale 1. A slice with NaN or infinity gets the scale NaN, so that the layer's
    result is NaN as well.

    Returns:
        uint8 codes of the shape of `x`, and float32 scales, in which `dims` have size 1.
    """
    x = x.to(torch.float32)
    largest = x.abs().amax(dim=dims, keepdim=True)
    scale = scale_of(largest, LARGEST, inverted=False)
    scale = scale.masked_fill(~torch.isfinite(largest), torch.nan)
    codes = torch.round(x / scale) + ZERO
    return codes.clamp(ZERO - LARGEST, ZERO + LARGEST).to(torch.uint8), scale


class Dynamic(WeightOnly):
    """Base class of the dynamic layers; the first call on a device lays the weight out."""

    _prepared: _Prepared | None = None

    def spec(self) -> LayerSpec:
        """The layer's shape and bits, for the kernel."""
        raise NotImplementedError

    def held(self) -> list[Tensor]:
        """As `WeightOnly.held`, plus the kernel's layout of the weight."""
        prepared = self._prepared
        return [*super().held(), *(prepared.state if prepared else ())]

    @torch.compiler.disable  # graphs treat the result as a constant
    def prepare(self) -> _Prepared:
        """Choose a kernel and lay the weight out for it; other threads wait until that is done."""
        with PREPARING:
            device, spec = self.weight.device, self.spec()
            found = self._prepared
            if found is not None and found.device == device:
                return found
            kernel = choose(spec, device).kernel
            state = kernel.prepare(self.weight.view(self.weight_shape), self.weight_scale, spec)
            one = torch.ones(1, device=device)
            zero_point = torch.full((1,), ZERO, dtype=torch.int32, device=device)
            self._prepared = found = _Prepared(device, kernel, state, spec, one, zero_point)
            return found

    def scaled_products(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        """The layer's result without the bias, float32, with one scale per slice over `dims`.

        The gradient is that of the float layer: each scale covers all values of its slice, so the
        grid clips nothing.
        """

        def compute(x: Tensor) -> Tensor:
            codes, scale = dynamic_codes(x, dims)
            return self.products(codes) * scale

        if not wants_gradient(x):
            return compute(x)

        def gradient(grad: Tensor) -> Tensor:
            return gradient_of_input(grad, self.float_weight(torch.float32), self.spec(), x.shape)

        return straight_through(x, compute, gradient)

    def products(self, codes: Tensor) -> Tensor:
        """`weight_scale * sum((codes - 128) * weight)` for uint8 `codes`: float32, without bias."""
        at = self._prepared
        if at is None or at.device != self.weight.device:
            at = self.prepare()
        return at.kernel.run(at.state, codes, at.one, at.zero_point, None, None, at.spec)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._prepared = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # The kernel's layout cannot be copied, so a copy lays out its weight again.
        return {**self.__dict__, "_prepared": None}


class _Prepared:
    """A kernel, the weight in its layout, and the call's constants."""

    def __init__(
        self,
        device: torch.device,
        kernel: Kernel,
        state: State,
        spec: LayerSpec,
        one: Tensor,
        zero_point: Tensor,
    ) -> None:
        self.device, self.kernel, self.state, self.spec = device, kernel, state, spec
        self.one, self.zero_point = one, zero_point


class DynamicLinear(Dynamic, WeightOnlyLinear):
    """`nn.Linear` in integer arithmetic, with one activation scale per token (vector `[C_in]`)."""

    def spec(self) -> LayerSpec:
        """The layer's shape and bits, for the kernel."""
        return LayerSpec("linear", self.in_features, self.out_features, 8, 8)

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, for float `[..., C_in]`; the result `[..., C_out]` has its dtype.

        Raises StepQuantError for an input that is not floating point.
        """
        self.check_floating(x := input)
        y = self.scaled_products(x, (-1,))
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class DynamicConv2d(Dynamic, WeightOnlyConv2d):
    """`nn.Conv2d` (one group, zero padding) in integer arithmetic, with one scale per sample."""

    def spec(self) -> LayerSpec:
        """The layer's shape and bits, for the kernel."""
        return LayerSpec(
            "conv2d",
            self.in_channels,
            self.out_channels,
            8,
            8,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
        )

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv2d`, for float `[B, C_in, H, W]`; the result has its dtype.

        Raises StepQuantError for an input that is not floating point.
        """
        self.check_floating(x := input)
        y = self.scaled_products(x, (1, 2, 3))
        return (y if self.bias is None else y + self.bias.view(1, -1, 1, 1)).to(x.dtype)
