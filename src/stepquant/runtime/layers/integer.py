"""Linear and conv layers that compute in integers, on packed weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor, nn

from stepquant.models.non_finite import NonFiniteError, let_through
from stepquant.quantizers.activation import TakesErrors
from stepquant.quantizers.step_grid import StepContext
from stepquant.runtime.kernels import Backend
from stepquant.runtime.layers.laid_out_layer import LaidOutLayer
from stepquant.runtime.layers.layer_tensors import Reader, not_read
from stepquant.runtime.layers.straight_through import (
    gradient_of_input,
    straight_through,
    wants_gradient,
    with_gradient_of,
)
from stepquant.runtime.layers.window_of_spec import WindowOfSpec
from stepquant.runtime.ops import native
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.support.moved_modules import old_names
from stepquant.support.refusal import Refusal, RefusalCode

FLOATS = (torch.float32, torch.bfloat16)  # dtypes that the fused encoding supports


class Branches(Protocol):
    """Float branches beside a layer (`runtime.layers.lora_branch`)."""

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """`y`, the layer's result for `x`, plus those of all branches, in the dtype of `y`."""
        ...


class IntegerLayer(LaidOutLayer):
    """Base class of the integer linear and conv layers: their computation.

    `runtime.layers.laid_out_layer` holds the tensors and lays the weight out.
    """

    bypass: TakesErrors | None  # receives the input's quantization error
    lora: Branches | None

    def __init__(
        self,
        spec: LayerSpec,
        splits: tuple[int, ...],
        steps: int,
        context: StepContext,
        optional: Collection[str] = (),
    ) -> None:
        """As `LaidOutLayer`: buffers of the right shapes, with arbitrary values."""
        super().__init__(spec, splits, steps, context, optional)
        self._not_for_codes = not_read(self.present(), Reader.CODES)
        self.bypass = None
        self.lora = None  # a module if there are branches, see `runtime.layers.lora_branch`

    def why_no_codes(self) -> Refusal | None:
        """Why the layer currently cannot take codes instead of floats, or None."""
        if self.backend != Backend.AUTO:
            return Refusal(RefusalCode.BACKEND, f"the backend '{self.backend}'")
        if self._not_for_codes:
            return Refusal(RefusalCode.TENSOR, f"the layer's tensor {self._not_for_codes[0]}")
        return self.prepared().why_no_codes()

    def forward(self, x: Tensor) -> Tensor:
        """Quantize `x`, multiply in integers and dequantize the result.

        `x`: float `[B, C_in, H, W]`, or `[B, ..., C_in]` for linear layers. The result has its
        dtype. The gradient is the straight-through estimator's; see
        `runtime.layers.straight_through`.
        """
        if self.bypass is not None:
            self.bypass.take(self.input_error(x))
        y = self._quantized(x) if not wants_gradient(x) else self._differentiable(x)
        return y if self.lora is None else self.lora.add_to(y, x)

    def _quantized(self, x: Tensor) -> Tensor:
        prepared = self.prepared()
        if x.dtype in FLOATS and self.why_no_codes() is None:
            if torch.compiler.is_compiling() or native.available():
                try:
                    return prepared.run(prepared.encode(x), dtype=x.dtype)
                except NonFiniteError:  # outside a denoiser's call, whose hooks need no error
                    pass
            else:
                return let_through(prepared.run(prepared.encode(x), dtype=x.dtype), x)
        return let_through(prepared.run_floats(x, self.bias, self.step_bias).to(x.dtype), x)

    def _differentiable(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            slope = self.prepared().slope(x)

        def gradient(grad: Tensor) -> Tensor:
            weight = self.float_weight().to(grad.device)
            return gradient_of_input(grad, weight, self.spec, slope.shape) * slope

        return straight_through(x, self._quantized, gradient)

    def input_error(self, x: Tensor) -> Tensor:
        """The quantization error of the input: `x` minus its value on the grids, float32.

        The error has the shape of `x`. Its gradient is 1 where the grids clip `x`, and 0 elsewhere.
        """
        with torch.no_grad():
            error = self.prepared().input_error(x)
        if not wants_gradient(x):
            return error
        with torch.no_grad():
            clipped = self.prepared().slope(x) == 0
        return with_gradient_of(error, x.to(torch.float32) * clipped)

    def extra_repr(self) -> str:
        """The layer's sizes and bits, as `print(model)` shows them."""
        spec = self.spec
        return (
            f"{spec.in_channels}, {spec.out_channels}, weight_bits={spec.weight_bits}, "
            f"activation_bits={spec.activation_bits}, steps={self.steps}, parts={self.splits}"
        )


class IntegerLinear(IntegerLayer):
    """Integer `nn.Linear`, for inputs `[B, ..., C_in]`."""

    channel_dim = -1

    @property
    def in_features(self) -> int:
        """The number of in-channels, as in `nn.Linear`."""
        return self.spec.in_channels

    @property
    def out_features(self) -> int:
        """The number of out-channels, as in `nn.Linear`."""
        return self.spec.out_channels


class IntegerConv2d(WindowOfSpec, IntegerLayer):
    """Integer `nn.Conv2d` with zero padding and one group, for inputs `[B, C_in, H, W]`."""

    channel_dim = 1


def is_packed(model: nn.Module) -> bool:
    """Whether `model` has integer layers."""
    return any(isinstance(module, IntegerLayer) for module in model.modules())


__getattr__ = old_names(
    __name__,
    {
        "PackedLayer": f"{__name__}.IntegerLayer",
        "PackedLinear": f"{__name__}.IntegerLinear",
        "PackedConv2d": f"{__name__}.IntegerConv2d",
    },
)
