"""An integer layer whose weight is laid out; it runs on floats or on codes.

`IntegerLayer.forward` takes floats and encodes them. The operation before a layer (a norm, an
activation, a sum) can instead write the codes itself: in the same pass over memory, with the
padding that a conv reads, and without a float tensor. The layer then starts from these codes. The
results are the same, except for the order of float operations before rounding.
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

# Buffers whose values enter the kernel's layout, and buffers that grids read where they lie. Calls
# read the other buffers directly.
LAID_OUT = ("weight_scale", "weight_zero_point", "channel_bits", "act_channel_scale")
IN_PLACE = ("act_scale", "act_zero_point")
APART = Refusal(RefusalCode.TIMESTEPS, "samples at different timesteps")


class PreparedLayer:
    """The input parts of one layer, each with its kernel, at the step of the current forward pass.

    - `splits`: in-channels of each part.
    - `has_tables`: whether each step has its own row in the step tables.
    - `buffers`: the layer's buffers; `run` and `run_to_codes` read the biases in each call.
    - `device`: the device of the layer's tensors at the time of preparation.

    Several threads may use it at once, because it keeps no state of a call.
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
        # Inference tensors have no version counter.
        names = (*LAID_OUT, *IN_PLACE)
        found = [(name, each) for name in names if (each := buffers[name]) is not None]
        self._made_of = [
            (name, each, -1 if name in IN_PLACE or each.is_inference() else each._version)
            for name, each in found
        ]

    def is_outdated(self, replaced: bool = True) -> bool:
        """Whether a tensor behind the layout has been changed in place since its preparation.

        `replaced`: whether another tensor in its place counts, too. Hooks that move tensors put
        equal ones there.
        """
        buffers = self._buffers
        for name, tensor, version in self._made_of:  # in every call: faster than any()
            if version >= 0 and tensor._version != version:
                return True
            if replaced and buffers[name] is not tensor:
                return True
        return False

    def why_no_codes(self) -> Refusal | None:
        """Why `run` currently cannot replace `run_floats`, or None.

        A kernel may take no codes or need two calls, samples may be at different timesteps, and
        timesteps may be on another device than the CPU.
        """
        if self._has_tables:
            rows = self._context.rows
            if rows.numel() != 1:
                return APART
            if not rows.is_cpu:
                return Refusal(RefusalCode.TIMESTEPS, f"timesteps on the device {rows.device.type}")
        for part in self.parts:
            if part.no_codes is not None:
                return part.no_codes
        return None

    def grid(self) -> Grid:
        """The activation grid of a layer with one input part, at the current step."""
        (part,) = self.parts
        return part.grid_at(self._row())

    def outputs(self) -> list[Output]:
        """The code images that the producer of a conv's input `[B, C_in, H, W]` must write.

        There is one for each input part.
        """
        row = self._row()
        return [
            Output(part.start, part.spec.in_channels, part.grid_at(row), part.spec.padding)
            for part in self.parts
        ]

    def encode(self, x: Tensor, activation: str = "none") -> list[Tensor]:
        """uint8 codes of `activation(x)` for `run`, one tensor for each input part.

        `x`: float `[B, C_in, H, W]`, or `[..., C_in]` for linear layers. `activation`: as in
        `fused.encode`.
        """
        if x.dim() == 4 and self._is_linear:  # not an image: channels come last
            codes = self.encode(x.flatten(0, 2), activation)
            return [code.view(*x.shape[:3], code.shape[-1]) for code in codes]
        return self._encoded(self._split(x), activation)

    def encode_parts(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """`encode` for `inputs [B, C_i, H, W]` concatenated over channels.

        It copies nothing if the inputs match the layer's input parts.
        """
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
        """The layer's result for the `codes` of its input, times `gate`, plus `added`.

        Args:
            codes: uint8, one tensor for each input part: `[B, C, H + 2 ph, W + 2 pw]`, channels
                last and padded with the part's zero point, or `[..., C]` for linear layers.
            added: Float in the result's shape, or None.
            dtype: The dtype of the result.
            overwrite: Whether the kernel may overwrite `added`.
            gate: Float `[B, C_out]`, one factor for all pixels or tokens of a sample, or None;
                only for layers with one input part.

        Returns:
            The result, channels last or contiguous, rounded to `dtype` once.
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
            bias = step_bias = None  # only the first part adds them
        assert y is not None
        return y

    def run_to_codes(
        self, code: Tensor, activation: str, gated: bool, output_grid: Grid, dtype: torch.dtype
    ) -> Tensor:
        """Codes of `activation(y)`, where `y` is the result of a linear layer with one input part.

        Args:
            code: uint8 `[..., C_in]`.
            activation: As in `fused.encode`.
            gated: Encode the first half of the channels of `y` times the activation of the second
                half.
            output_grid: The grid of the returned codes.
            dtype: The dtype of `y`, if the kernel does not encode its result itself.

        Returns:
            uint8 `[..., C_out]`, or half of these channels if `gated`.
        """
        (part,) = self.parts
        bound = part.weight.bound(self._buffers["bias"], self._buffers["step_bias"])
        grid = part.grid_at(self._row())
        return bound.run_to_codes(code, grid, activation, gated, output_grid, dtype)

    def run_floats(self, x: Tensor, bias: Tensor | None, step_bias: Tensor | None) -> Tensor:
        """The layer's float32 result for floats `x`, whose samples may be at different steps.

        `bias`: float32 `[C_out]`, or None. `step_bias`: float32 `[T, C_out]`, or None.
        """
        states = [part.weight.state() for part in self.parts]
        rows = self._context.rows.to(x.device)
        if not self._has_tables:
            return self._at_row(states, x, torch.zeros_like(rows[:1]), bias, step_bias)
        if rows.numel() == 1:
            return self._at_row(states, x, rows, bias, step_bias)
        if torch.compiler.is_compiling():
            # A graph cannot depend on which rows are equal, so each row gets a kernel call of its
            # own. The values are the same.
            pieces = x.split(neighbours(rows, x.shape[0]))
            return torch.cat(
                [
                    self._at_row(states, each, rows[b : b + 1], bias, step_bias)
                    for b, each in enumerate(pieces)
                ]
            )
        # For samples at different steps, one kernel call for each distinct row.
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
        """The result with all samples of `x` at `row [1]`; `states` are those of the weights."""
        if step_bias is not None:
            of_step = step_bias.index_select(0, row)[0]
            bias = of_step if bias is None else bias + of_step
        y: Tensor | None = None
        for each, part, state in zip(self._split(x), self.parts, states, strict=True):
            y = part.run_floats(state, each, row, bias, y, self._channel_dim)
            bias = None  # only the first part adds it
        assert y is not None
        return y

    def input_error(self, x: Tensor) -> Tensor:
        """The quantization error of `x` (`x` minus its value on the grids), float32."""
        rows = self._rows_of(x)
        pairs = zip(self._split(x.to(torch.float32)), self.parts, strict=True)
        errors = [part.input_error(each, rows, self._channel_dim) for each, part in pairs]
        return torch.cat(errors, dim=self._channel_dim)

    def slope(self, x: Tensor) -> Tensor:
        """The gradient of the quantized input with respect to `x`, float32, in its shape."""
        rows = self._rows_of(x)
        pairs = zip(self._split(x.to(torch.float32)), self.parts, strict=True)
        slopes = [part.slope(each, rows, self._channel_dim) for each, part in pairs]
        return torch.cat(slopes, dim=self._channel_dim)

    def _rows_of(self, x: Tensor) -> Tensor:
        """The step row of each sample of `x`, int64 `[B]`."""
        rows = self._context.rows if self._has_tables else torch.zeros_like(self._context.rows[:1])
        return spread_rows(rows.to(x.device), x.shape[0])

    def _row(self) -> Tensor | None:
        return self._context.rows if self._has_tables else None

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.splits, dim=self._channel_dim) if len(self.splits) > 1 else (x,)
