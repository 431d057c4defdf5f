"""Linear and conv layers with 8-bit weights and activations whose scales are found at each call.

For a float model that is quantized while it is loaded, without calibration: no step tables. The
sums are those of whole numbers, on the kernels of the integer layers.
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
    """uint8 codes of `x` and float32 scales, one for each slice over `dims`, which are kept as 1.

    `x ~ (codes - 128) * scale`; the largest magnitude of a slice has the code 1 or 255, and a slice
    of zeros the scale 1. A slice with NaN or infinity has the scale NaN, which lets them through.
    """
    x = x.to(torch.float32)
    largest = x.abs().amax(dim=dims, keepdim=True)
    scale = scale_of(largest, LARGEST, inverted=False)
    scale = scale.masked_fill(~torch.isfinite(largest), torch.nan)
    codes = torch.round(x / scale) + ZERO
    return codes.clamp(ZERO - LARGEST, ZERO + LARGEST).to(torch.uint8), scale


class Dynamic(WeightOnly):
    """What both kinds share: the kernel, laid out at the first call on a device."""

    _prepared: _Prepared | None = None

    def spec(self) -> LayerSpec:
        """What a kernel has to know of the layer."""
        raise NotImplementedError

    def held(self) -> list[Tensor]:
        """Also the weight as it is laid out."""
        prepared = self._prepared
        return [*super().held(), *(prepared.state if prepared else ())]

    @torch.compiler.disable  # its result is a constant of the graph
    def prepare(self) -> _Prepared:
        """Choose a kernel and lay the weight out for it; another thread waits until it is done."""
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
        """The layer's result for `x` without the bias, float32; a scale for each slice over `dims`.

        Its gradient is that of the float layer: scales cover every value, so nothing is clipped.
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
        """`weight_scale * sum((codes - 128) * weight)`, float32, without a bias."""
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
        # A copy lays its weight out anew: the kernel's layout cannot be copied.
        return {**self.__dict__, "_prepared": None}


class _Prepared:
    """A kernel with the weight in its layout, and its constants."""

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
    """`nn.Linear` on integers; a scale for each token, that is, each vector `[C_in]`."""

    def spec(self) -> LayerSpec:
        """What a kernel has to know of the layer."""
        return LayerSpec("linear", self.in_features, self.out_features, 8, 8)

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, in the dtype of `input [..., C_in]`."""
        self.check_floating(x := input)
        y = self.scaled_products(x, (-1,))
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class DynamicConv2d(Dynamic, WeightOnlyConv2d):
    """`nn.Conv2d` of one group with zero padding, on integers; a scale for each sample."""

    def spec(self) -> LayerSpec:
        """What a kernel has to know of the layer."""
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
        """As `nn.Conv2d`, in the dtype of `input [B, C_in, H, W]`."""
        self.check_floating(x := input)
        y = self.scaled_products(x, (1, 2, 3))
        return (y if self.bias is None else y + self.bias.view(1, -1, 1, 1)).to(x.dtype)
