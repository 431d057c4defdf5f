"""The interface of integer kernels.

A kernel computes, for one input part of a layer,

    y = act_scale * weight_scale * sum((codes - act_zero_point) * weight) + bias (+ accumulate)

where

- `codes` is uint8 `[B, C, H, W]`, or `[..., C]` for linear layers;
- `weight` is int8 `[C_out, C_in, kh, kw]` or `[C_out, C_in]`: differences `code - zero point`;
- `act_scale` is float32 `[1]`, and `act_zero_point` int32 `[1]`;
- `weight_scale` and `bias` are float32 `[C_out]`;
- `y` and `accumulate` are float32 in the result's shape.

Padding is float zero, that is, the code `act_zero_point`. Sums are exact integers. A kernel may add
`sum(codes * weight)` and the zero point's share in float32, which is exact while each is below
2^24.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from stepquant.runtime.ops import fused
from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.support.refusal import Refusal

State = tuple[Tensor, ...]


class Kernel(ABC):
    """An integer kernel, without state of its own: one object serves all layers."""

    name: ClassVar[str]
    """The backend name by which users choose the kernel."""
    device_types: ClassVar[tuple[str, ...]] = ()
    """The supported device types, by torch's names; empty: all devices."""

    @abstractmethod
    def why_not(self, spec: LayerSpec, device: torch.device) -> Refusal | None:
        """Why this kernel cannot run the layer on `device`, or None."""

    @abstractmethod
    def prepare(self, weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> State:
        """The state for `run`: the result of `lay_out`, then small tensors derived from the weight.

        The layer calls this once after loading or moving, and never saves the state. For `weight`
        and `weight_scale` see the module docstring.
        """

    @abstractmethod
    def lay_out(self, weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> Tensor:
        """The weight in the kernel's layout. In the memory mode "low", each call runs this."""

    @abstractmethod
    def differences(self, laid_out: Tensor, spec: LayerSpec) -> Tensor:
        """The inverse of `lay_out`: the int8 weight, bit for bit."""

    @abstractmethod
    def run(
        self,
        state: State,
        codes: Tensor,
        act_scale: Tensor,
        act_zero_point: Tensor,
        bias: Tensor | None,
        accumulate: Tensor | None,
        spec: LayerSpec,
    ) -> Tensor:
        """The float32 result `y` of the module docstring.

        `accumulate`: the sum over the input parts before this one, or None.
        """


class TakesCodes(Kernel):
    """A kernel that reads codes in place, from a padded image, and reads the step table itself.

    The operation before a layer can then write the codes in the same pass as its own result.
    """

    def why_no_codes(self, spec: LayerSpec) -> Refusal | None:
        """Why the kernel cannot take codes for the layer, or None."""
        del spec
        return None

    @abstractmethod
    def bind(
        self, state: State, bias: Tensor | None, step_bias: Tensor | None, spec: LayerSpec
    ) -> BoundWeight:
        """The weight with its biases, for calls with codes.

        `state`: from `prepare`. `bias`: float32 `[C_out]`, or None. `step_bias`: float32
        `[T, C_out]`, added to `bias` at each step, or None.
        """


class BoundWeight(ABC):
    """A weight with its biases, in the form that a kernel reads in calls with codes."""

    spec: LayerSpec

    @abstractmethod
    def is_current(self, bias: Tensor | None, step_bias: Tensor | None) -> bool:
        """Whether these are the bound biases, and all tensors are still at their addresses."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The tensors that calls read."""

    @abstractmethod
    def run(
        self,
        codes: Tensor,
        grid: Grid,
        added: Tensor | None,
        overwrite: bool,
        dtype: torch.dtype,
        gate: Tensor | None,
    ) -> Tensor:
        """The layer's result for `codes` on `grid`, times `gate`, plus `added`.

        Integer sums are rounded once to float32, and once to `dtype`.

        Args:
            codes: uint8 `[B, C, H + 2 ph, W + 2 pw]`, channels last and padded with the zero point,
                or `[..., C]` for linear layers.
            grid: The activation grid.
            added: float32 or bfloat16 in the result's shape, or None.
            overwrite: Whether the kernel may write the result to `added`.
            dtype: The dtype of the result.
            gate: Float `[B, C_out]`, one factor for all pixels or tokens of a sample, or None.
        """

    def run_to_codes(
        self,
        codes: Tensor,
        grid: Grid,
        activation: str,
        gated: bool,
        output_grid: Grid,
        dtype: torch.dtype,
    ) -> Tensor:
        """Codes of `activation(y)` on `output_grid`, where `y` is a linear layer's result.

        This default writes `y` to memory; a fused kernel may encode it directly.

        Args:
            codes: uint8 `[..., C_in]`.
            grid: The activation grid of `codes`.
            activation: As in `fused.encode`.
            gated: Encode the first half of the channels of `y` times the activation of the second
                half, as `fused.gated_encode` does.
            output_grid: The grid of the returned codes.
            dtype: The dtype of `y`, if it is written to memory.

        Returns:
            uint8 `[..., C_out]`, or half of these channels if `gated`.
        """
        y = self.run(codes, grid, None, False, dtype, None)
        if gated:
            return fused.gated_encode(y, activation, output_grid)
        return fused.encode(y, activation, output_grid)
