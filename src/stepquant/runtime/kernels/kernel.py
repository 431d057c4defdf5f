"""What an integer kernel computes, and the methods that it has.

A kernel computes, for one input part of a layer,

    y = act_scale * weight_scale * sum((codes - act_zero_point) * weight) + bias (+ accumulate)

with integer sums, from `codes` uint8 (`[B, C, H, W]`, or `[..., C]` for linear), `weight` int8
differences `code - zero point` (`[C_out, C_in, kh, kw]` or `[C_out, C_in]`), `act_scale [1]`
float32 and `act_zero_point [1]` int32, `weight_scale [C_out]` float32; `y` is float32. Zero padding
is float zero, that is, code `act_zero_point`. Sums are exact. A kernel may join `sum(codes *
weight)` and the zero point's share in float32, which is exact as long as each is below 2^24.
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
    """An integer kernel. It has no state of its own: one object serves all layers."""

    name: ClassVar[str]
    """The backend that a user asks for."""
    device_types: ClassVar[tuple[str, ...]] = ()
    """The types of device, as torch names them, that it is made for; none: it runs everywhere."""

    @abstractmethod
    def why_not(self, spec: LayerSpec, device: torch.device) -> Refusal | None:
        """Why this kernel cannot take the layer on `device`, or None."""

    @abstractmethod
    def prepare(self, weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> State:
        """The state that `run` takes: what `lay_out` returns, then small tensors of the weight.

        `weight`, `weight_scale`: see the module docstring. Called once after loading or moving;
        the state is never saved.
        """

    @abstractmethod
    def lay_out(self, weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> Tensor:
        """The weight alone, in the kernel's layout. In the memory mode "low" each call asks."""

    @abstractmethod
    def differences(self, laid_out: Tensor, spec: LayerSpec) -> Tensor:
        """The int8 weight that `lay_out` was given, bit for bit."""

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
        """See the module docstring. `accumulate`: the sum of the input parts before this one."""


class TakesCodes(Kernel):
    """A kernel that takes codes where they lie, in a padded image, and reads the step table.

    What stands before a layer can then make its codes in the pass that writes its result.
    """

    def why_no_codes(self, spec: LayerSpec) -> Refusal | None:
        """Why the layer cannot be handed codes, or None."""
        del spec
        return None

    @abstractmethod
    def bind(
        self, state: State, bias: Tensor | None, step_bias: Tensor | None, spec: LayerSpec
    ) -> BoundWeight:
        """The weight with its biases, for calls with codes.

        `bias` float32 `[C_out]` and `step_bias` float32 `[T, C_out]`, added to it at each step.
        """


class BoundWeight(ABC):
    """A weight with its biases, as a kernel reads them in each call with codes."""

    spec: LayerSpec

    @abstractmethod
    def is_current(self, bias: Tensor | None, step_bias: Tensor | None) -> bool:
        """Whether these biases are the bound ones, and all tensors lie where they lay."""

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

        `codes`: uint8 `[B, C, H + 2 ph, W + 2 pw]`, channels last, with the zero point around the
        image, or `[..., C]`. `added`: float32 or bfloat16 in the result's shape; the kernel may
        write the result to its place if `overwrite`. `gate`: float `[B, C_out]`, one factor for all
        pixels or tokens of a sample. The result has `dtype`; sums are rounded once to float32, and
        once to `dtype`.
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
        """Codes, on `output_grid`, of the activation of a linear layer's result for `codes`.

        `gated`: of the first half of the channels times the activation of the second half. Here the
        result has `dtype` and is written to memory; a kernel may encode it on the way. `codes`,
        `activation` and the codes returned are as in `fused.encode` and `fused.gated_encode`.
        """
        y = self.run(codes, grid, None, False, dtype, None)
        if gated:
            return fused.gated_encode(y, activation, output_grid)
        return fused.encode(y, activation, output_grid)
