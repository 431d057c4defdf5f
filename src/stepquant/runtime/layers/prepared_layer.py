"""An integer layer whose weight is laid out: it runs on floats, or from its codes on.

`IntegerLayer.forward` takes floats and encodes them. Whatever stands before a layer (a norm, an
activation, a sum) can write the codes itself, in the same pass over memory and in the frame that a
padded conv reads, and leave the float tensor out. Then the layer begins at its codes. The numbers
are the same, except for the order of float operations before the rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stepquant.quantizers.activation import neighbours, spread_rows
from stepquant.quantizers.step_grid import StepContext
from stepquant.runtime.kernels import State
from stepquant.runtime.layers.input_part import InputPart
from stepquant.runtime.ops.grids import Grid, Output
from stepquant.support.refusal import Refusal, RefusalCode

# Buffers whose values are part of what kernels make of the weight; others are read at each call.
LAID_OUT = ("weight_scale", "weight_zero_point", "channel_bits", "act_channel_scale")
APART = Refusal(RefusalCode.TIMESTEPS, "samples at different timesteps")


class PreparedLayer:
    """The input parts of one layer, each with its kernel, at the step of the forward in flight.

    `splits`: in-channels of each part. `has_tables`: whether each step has a row of its own.
    `buffers`: of the layer, for its biases; `run` and `run_to_codes` look them up at each call.
    `device`: where the layer's tensors were when it was prepared.

    Several threads may use it at once: it holds nothing of a call.
    """

    def __init__(
        self,
        parts: Sequence[InputPart],
        splits: tuple[int, ...],
        channel_dim: int,
        has_tables: bool,
        context: StepContext,
        buffers: Mapping[str, Tensor | None],
        device: torch.device,
    ) -> None:
        self.device = device
        self.parts, self.splits = list(parts), tuple(splits)
        self._channel_dim, self._has_tables, self._context = channel_dim, has_tables, context
        self._is_linear = self.parts[0].spec.kind == "linear"
        self._buffers = buffers
        # Tensors of inference mode count no changes.
        made_of = [buffers[name] for name in LAID_OUT]
        found = [each for each in made_of if each is not None and not each.is_inference()]
        self._made_of = [(each, each._version) for each in found]

    def is_outdated(self) -> bool:
        """Whether a tensor that the layout was made of has been changed in place since."""
        for tensor, version in self._made_of:  # noqa: SIM110  # at every call: quicker than any()
            if tensor._version != version:
                return True
        return False

    def why_no_codes(self) -> Refusal | None:
        """Why `run` does not do now what the kernel does with floats, or None.

        The kernel takes no codes or needs two calls, or samples are at different steps.
        """
        if self._has_tables:
            rows = self._context.rows
            if rows.numel() != 1:
                return APART
            if not rows.is_cpu:
                return Refusal(RefusalCode.TIMESTEPS, f"timesteps on {rows.device.type}")
        for part in self.parts:
            if part.no_codes is not None:
                return part.no_codes
        return None

    def grid(self) -> Grid:
        """The activation grid of a layer with one input part."""
        (part,) = self.parts
        return part.grid_at(self._row())

    def outputs(self) -> list[Output]:
        """What the producer of a conv's input `[B, C_in, H, W]` must write, for each part."""
        row = self._row()
        return [
            Output(part.start, part.spec.in_channels, part.grid_at(row), part.spec.padding)
            for part in self.parts
        ]

    def encode(self, x: Tensor, activation: str = "none") -> list[Tensor]:
        """The codes of `activation(x)` for `run`, one tensor for each input part."""
        if x.dim() == 4 and self._is_linear:  # no image, whose channels come second
            codes = self.encode(x.flatten(0, 2), activation)
            return [code.view(*x.shape[:3], code.shape[-1]) for code in codes]
        return self._encoded(self._split(x), activation)

    def encode_parts(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """`encode` of `inputs [B, C_i, H, W]` joined over channels; no copy where parts match."""
        if tuple([each.shape[1] for each in inputs]) != self.splits:
            return self.encode(inputs[0] if len(inputs) == 1 else torch.cat(list(inputs), dim=1))
        return self._encoded(inputs, "none")

    def _encoded(self, inputs: Sequence[Tensor], activation: str) -> list[Tensor]:
        row = self._row()
        return [
            part.encode(each, activation, row)
            for each, part in zip(inputs, self.parts, strict=True)
        ]

    def run(
        self,
        codes: Sequence[Tensor],
        added: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        overwrite: bool = False,
        gate: Tensor | None = None,
    ) -> Tensor:
        """The layer's result for its input's `codes`, times `gate`, plus `added`.

        `codes`: uint8, one tensor for each input part: `[B, C, H + 2 ph, W + 2 pw]` channels last
        with the part's zero point around the image, or `[..., C]` for linear layers. `added`:
        float, in the result's shape; the kernel may write over it if `overwrite` is set and it is
        float32. `gate`: float `[B, C_out]`, one factor for all pixels or tokens of a sample; only
        for layers with one input part. The result has `dtype`, is channels last or contiguous, and
        is rounded to `dtype` once.
        """
        assert gate is None or len(codes) == 1
        row, last = self._row(), len(codes) - 1
        bias, step_bias = self._buffers["bias"], self._buffers["step_bias"]
        y = added
        for part, code in zip(self.parts, codes, strict=True):
            mine = overwrite or part.index > 0
            out = dtype if part.index == last else torch.float32
            bound = part.weight.bound(bias, step_bias)
            y = bound.run(code, part.grid_at(row), y, mine, out, gate)
            bias = step_bias = None  # the first part adds them
        assert y is not None
        return y

    def run_to_codes(
        self, code: Tensor, activation: str, gated: bool, output_grid: Grid, dtype: torch.dtype
    ) -> Tensor:
        """Codes of the activation of the result of a linear layer with one input part.

        `gated`: of the first half of its channels times the activation of the second half. Where
        the kernel does not encode its result itself, the floats between have `dtype`.
        """
        (part,) = self.parts
        bound = part.weight.bound(self._buffers["bias"], self._buffers["step_bias"])
        grid = part.grid_at(self._row())
        return bound.run_to_codes(code, grid, activation, gated, output_grid, dtype)

    def run_floats(self, x: Tensor, bias: Tensor | None, step_bias: Tensor | None) -> Tensor:
        """The layer's result for floats, layer by layer: float32 or the dtype of `x`.

        `bias` float32 `[C_out]`, `step_bias` float32 `[T, C_out]`.
        """
        states = [part.weight.state() for part in self.parts]
        rows = self._context.rows.to(x.device)
        if not self._has_tables:
            return self._at_row(states, x, torch.zeros_like(rows[:1]), bias, step_bias)
        if rows.numel() == 1:
            return self._at_row(states, x, rows, bias, step_bias)
        if torch.compiler.is_compiling():
            # A graph cannot ask which rows are alike: one kernel call for each, same numbers.
            pieces = x.split(neighbours(rows, x.shape[0]))
            return torch.cat(
                [
                    self._at_row(states, each, rows[b : b + 1], bias, step_bias)
                    for b, each in enumerate(pieces)
                ]
            )
        # Samples at different steps: one kernel call for each distinct row.
        rows = spread_rows(rows, x.shape[0])
        y: Tensor | None = None
        for row in rows.unique():
            members = rows == row
            of_row = self._at_row(states, x[members], row.view(1), bias, step_bias)
            if y is None:
                y = of_row.new_empty((x.shape[0], *of_row.shape[1:]))
            y[members] = of_row
        assert y is not None
        return y

    def _at_row(
        self,
        states: list[State],
        x: Tensor,
        row: Tensor,
        bias: Tensor | None,
        step_bias: Tensor | None,
    ) -> Tensor:
        """Every sample of `x` at step row `row [1]`; `states`: of the parts' weights."""
        if step_bias is not None:
            of_step = step_bias.index_select(0, row)[0]
            bias = of_step if bias is None else bias + of_step
        y: Tensor | None = None
        for each, part, state in zip(self._split(x), self.parts, states, strict=True):
            y = part.run_floats(state, each, row, bias, y, self._channel_dim)
            bias = None  # the first part adds it
        assert y is not None
        return y

    def input_error(self, x: Tensor) -> Tensor:
        """`x` minus its value on the activation grids, in its shape, float32."""
        rows = self._rows_of(x)
        pairs = zip(self._split(x.to(torch.float32)), self.parts, strict=True)
        errors = [part.input_error(each, rows, self._channel_dim) for each, part in pairs]
        return torch.cat(errors, dim=self._channel_dim)

    def slope(self, x: Tensor) -> Tensor:
        """The gradient of what the weights multiply, by `x`, in its shape, float32."""
        rows = self._rows_of(x)
        pairs = zip(self._split(x.to(torch.float32)), self.parts, strict=True)
        slopes = [part.slope(each, rows, self._channel_dim) for each, part in pairs]
        return torch.cat(slopes, dim=self._channel_dim)

    def _rows_of(self, x: Tensor) -> Tensor:
        """The row of each sample of `x`, `[B]`."""
        rows = self._context.rows if self._has_tables else torch.zeros_like(self._context.rows[:1])
        return spread_rows(rows.to(x.device), x.shape[0])

    def _row(self) -> Tensor | None:
        return self._context.rows if self._has_tables else None

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.splits, dim=self._channel_dim) if len(self.splits) > 1 else (x,)
