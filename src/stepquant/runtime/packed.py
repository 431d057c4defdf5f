"""Linear and conv layers that hold packed weights and run on integer kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stepquant.numerics import check_bits, max_code, unpack_channels
from stepquant.quantizers.activation import TakesErrors, neighbours, spread_rows
from stepquant.quantizers.step_grid import StepContext
from stepquant.runtime import codes, kernels
from stepquant.runtime.grids import Grid
from stepquant.runtime.prepared import PreparedPart
from stepquant.runtime.spec import LayerSpec


class Branches(Protocol):
    """Float branches beside a layer (`runtime.lora_branch`)."""

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """`y`, what the layer gave for `x`, with all branches."""
        ...


class PackedLayer(nn.Module):
    """What the packed linear and conv layers share.

    Buffers, for `P` input parts, `T` rows (1 or the length of the step grid):
    `weight_packed` uint8 `[bytes]` (the parts one after another, `numerics.packing`'s bit order),
    `weight_scale` float32 `[P, C_out]`, `weight_zero_point` uint8 `[P, C_out]` (twice the zero
    point where the spec says `half_zero_points`), `channel_bits` uint8 `[C_out]` or absent,
    `act_scale` float32 `[P, T]`, `act_zero_point` uint8 `[P, T]`, `bias` float32 `[C_out]` or
    absent, `step_bias` float32 `[T, C_out]` or absent (added to `bias` at each step),
    `act_channel_scale` float32 `[C_in]` or absent (the input is divided by it).
    """

    channel_dim: int
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    channel_bits: Tensor | None
    act_scale: Tensor
    act_zero_point: Tensor
    bias: Tensor | None
    step_bias: Tensor | None
    act_channel_scale: Tensor | None
    lora: Branches | None

    def __init__(
        self,
        spec: LayerSpec,
        splits: tuple[int, ...],
        steps: int,
        context: StepContext,
        has_bias: bool,
        has_channel_scale: bool,
        has_step_bias: bool = False,
    ) -> None:
        """Empty buffers of the right shapes; `load_state_dict` or `runtime.pack` fills them."""
        super().__init__()
        check_bits(spec.weight_bits, "weight bits")
        check_bits(spec.activation_bits, "activation bits")
        self.spec, self.splits, self.steps, self.context = spec, splits, steps, context
        self.backend = "auto"
        parts, out = len(splits), spec.out_channels
        count = sum(part.packed_bytes for part in self.part_specs())
        self.register_buffer("weight_packed", torch.zeros(count, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones(parts, out))
        self.register_buffer("weight_zero_point", torch.zeros(parts, out, dtype=torch.uint8))
        mixed = spec.channel_counts is not None
        bits = torch.full((out,), spec.weight_bits, dtype=torch.uint8) if mixed else None
        self.register_buffer("channel_bits", bits)
        self.register_buffer("act_scale", torch.ones(parts, steps))
        self.register_buffer("act_zero_point", torch.zeros(parts, steps, dtype=torch.uint8))
        self.register_buffer("bias", torch.zeros(out) if has_bias else None)
        self.register_buffer("step_bias", torch.zeros(steps, out) if has_step_bias else None)
        channel_scale = torch.ones(spec.in_channels) if has_channel_scale else None
        self.register_buffer("act_channel_scale", channel_scale)
        self._prepared: list[PreparedPart] | None = None
        self._prepared_on: torch.device | None = None
        self.bypass: TakesErrors | None = None  # is given the errors of the input
        self.lora = None  # a module where there is something, see `runtime.lora_branch`

    def part_specs(self) -> list[LayerSpec]:
        """The spec of each input part."""
        return [replace(self.spec, in_channels=channels) for channels in self.splits]

    def weight_differences(self) -> list[Tensor]:
        """`code - zero point` of each part, int8 `[C_out, C_part, kh, kw]` (linear: two dims).

        In half steps, `2 * code - 2 * zero point`, where the spec says `half_zero_points`.
        """
        out, start = self.spec.out_channels, 0
        bits = torch.full((out,), self.spec.weight_bits)
        if self.channel_bits is not None:
            bits = self.channel_bits.cpu().to(torch.int64)
        step = 2 if self.spec.half_zero_points else 1
        differences = []
        packed = self.weight_packed.cpu()
        for index, part in enumerate(self.part_specs()):
            stop = start + part.packed_bytes
            codes = unpack_channels(packed[start:stop], bits, part.columns).to(torch.int16)
            zero = self.weight_zero_point[index].cpu().to(torch.int16)[:, None]
            shape: tuple[int, ...] = (out, part.in_channels)
            if part.kind == "conv2d":
                shape += part.kernel_size
            differences.append((step * codes - zero).to(torch.int8).view(shape))
            start = stop
        return differences

    def difference_scales(self) -> Tensor:
        """What `weight_differences` count in, float32 `[P, C_out]`."""
        return self.weight_scale / 2 if self.spec.half_zero_points else self.weight_scale

    def float_weight(self) -> Tensor:
        """The weight that the codes stand for, float32 `[C_out, C_in, ...]`."""
        parts = [
            difference.to(torch.float32) * scale.cpu().view(-1, *(1,) * (difference.dim() - 1))
            for difference, scale in zip(
                self.weight_differences(), self.difference_scales(), strict=True
            )
        ]
        return torch.cat(parts, dim=1)

    @torch.compiler.disable  # its result is a constant of the graph
    def prepare(self) -> None:
        """Choose kernels and lay the weight out for them; the first call does it otherwise."""
        device = self.weight_packed.device
        prepared = []
        differences, scales = self.weight_differences(), self.difference_scales()
        start = 0
        for index, part in enumerate(self.part_specs()):
            name, kernel, reasons = kernels.choose(part, device, self.backend)
            weight = differences[index].to(device)
            state = kernel.prepare(weight, scales[index], part)
            inverse = None
            if self.act_channel_scale is not None:
                shape = [1] * (4 if part.kind == "conv2d" else 1)
                shape[self.channel_dim] = -1
                scale = self.act_channel_scale[start : start + part.in_channels]
                inverse = (1.0 / scale).view(shape)
            grid = Grid(
                self.act_scale[index],
                self.act_zero_point[index],
                None,
                max_code(self.spec.activation_bits),
            )
            prepared.append(PreparedPart(part, name, kernel, reasons, state, grid, start, inverse))
            start += part.in_channels
        self._prepared, self._prepared_on = prepared, device

    def prepared_parts(self) -> list[PreparedPart]:
        """The parts, laid out on the device where the tensors are now.

        accelerate's hooks put tensors on another device without asking the module.
        """
        if self._prepared is None or self._prepared_on != self.weight_packed.device:
            self.prepare()
        assert self._prepared is not None
        return self._prepared

    def kernel_names(self) -> list[str]:
        """The kernel that each part runs on."""
        return [part.kernel_name for part in self.prepared_parts()]

    def fallback_reasons(self) -> list[str]:
        """Why the parts that run on the reference kernel do."""
        return [
            "; ".join(part.reasons)
            for part in self.prepared_parts()
            if part.kernel_name == "reference" and part.reasons
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Float in, float out, integers between; the result has the dtype of `x`."""
        if self.bypass is not None:
            self.bypass.take(self.input_error(x))
        y = self._quantized(x)
        return y if self.lora is None else self.lora.add_to(y, x)

    def _quantized(self, x: Tensor) -> Tensor:
        self.prepared_parts()
        if x.dtype in codes.FLOATS and codes.why_not(self) is None:
            return codes.run(self, codes.encode(self, x)).to(x.dtype)
        rows = self.context.rows.to(x.device)
        if self.steps == 1:
            return self._run(x, torch.zeros_like(rows[:1])).to(x.dtype)
        if rows.numel() == 1:
            return self._run(x, rows).to(x.dtype)
        if torch.compiler.is_compiling():
            # A graph cannot ask which rows are alike: one kernel call for each, same numbers.
            parts = x.split(neighbours(rows, x.shape[0]))
            found = [self._run(part, rows[b : b + 1]) for b, part in enumerate(parts)]
            return torch.cat(found).to(x.dtype)
        # Samples at different steps: one kernel call for each distinct row.
        rows = spread_rows(rows, x.shape[0])
        y: Tensor | None = None
        for row in rows.unique():
            members = rows == row
            part = self._run(x[members], row.view(1))
            if y is None:
                y = part.new_empty((x.shape[0], *part.shape[1:]))
            y[members] = part
        assert y is not None
        return y.to(x.dtype)

    def _run(self, x: Tensor, row: Tensor) -> Tensor:
        """Every sample of `x` at step row `row [1]`."""
        assert self._prepared is not None
        y = None
        bias = self.bias
        if self.step_bias is not None:
            of_step = self.step_bias.index_select(0, row)[0]
            bias = of_step if bias is None else bias + of_step
        inputs = x.split(self.splits, dim=self.channel_dim) if len(self.splits) > 1 else (x,)
        for index, (part, prepared) in enumerate(zip(inputs, self._prepared, strict=True)):
            scale = self.act_scale[index].index_select(0, row)
            zero_point = self.act_zero_point[index].index_select(0, row)
            if prepared.inverse_channel_scale is not None:
                part = part * prepared.inverse_channel_scale
            codes = encode(part, scale, zero_point, self.spec.activation_bits)
            y = prepared.kernel.run(
                prepared.state,
                codes,
                scale,
                zero_point.to(torch.int32),
                bias if index == 0 else None,
                y,
                prepared.spec,
            )
        assert y is not None
        return y

    def input_error(self, x: Tensor) -> Tensor:
        """What the activation grids do not hold of the input `x`, in its shape, float32."""
        rows = torch.zeros_like(self.context.rows[:1]) if self.steps == 1 else self.context.rows
        rows = spread_rows(rows.to(x.device), x.shape[0])
        errors = []
        inputs = x.to(torch.float32).split(self.splits, dim=self.channel_dim)
        for index, (part, prepared) in enumerate(zip(inputs, self.prepared_parts(), strict=True)):
            scale, zero_point = (
                table[index].index_select(0, rows).view(-1, *(1,) * (x.dim() - 1))
                for table in (self.act_scale, self.act_zero_point)
            )
            inverse = prepared.inverse_channel_scale
            scaled = part if inverse is None else part * inverse
            codes = encode(scaled, scale, zero_point, self.spec.activation_bits)
            error = scaled - (codes.to(torch.float32) - zero_point) * scale
            errors.append(error if inverse is None else error / inverse)
        return torch.cat(errors, dim=self.channel_dim)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLayer:
        self._prepared = None  # the kernel's layout belongs to the old device

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # Scales and biases stay float32 in a bf16 or fp16 model.
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A copy lays its weight out anew: the kernel's layout cannot be copied.
        return {**self.__dict__, "_prepared": None}

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        spec = self.spec
        return (
            f"{spec.in_channels}, {spec.out_channels}, weight_bits={spec.weight_bits}, "
            f"activation_bits={spec.activation_bits}, steps={self.steps}, parts={self.splits}"
        )


def encode(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """uint8 codes of `x` for `scale [1]` and `zero_point [1]`: `numerics.quantize` in one pass."""
    x = x.to(torch.float32)
    if torch.compiler.is_compiling():
        codes = torch.round(x * (1.0 / scale)) + zero_point
        return codes.clamp(0, max_code(bits)).to(torch.uint8)
    codes = x * (1.0 / scale)
    return codes.round_().add_(zero_point).clamp_(0, max_code(bits)).to(torch.uint8)


class PackedLinear(PackedLayer):
    """Packed `nn.Linear`; inputs `[B, ..., C_in]`."""

    channel_dim = -1

    @property
    def in_features(self) -> int:
        """As in `nn.Linear`."""
        return self.spec.in_channels

    @property
    def out_features(self) -> int:
        """As in `nn.Linear`."""
        return self.spec.out_channels


class PackedConv2d(PackedLayer):
    """Packed `nn.Conv2d` with zero padding and one group; inputs `[B, C_in, H, W]`."""

    channel_dim = 1
