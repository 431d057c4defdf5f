"""Linear and conv layers that hold packed weights and run on integer kernels."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stepquant.numerics import check_bits, max_code
from stepquant.quantizers.activation import TakesErrors, neighbours, spread_rows
from stepquant.quantizers.step_grid import StepContext
from stepquant.runtime import kernels
from stepquant.runtime.layers import codes, resident
from stepquant.runtime.layers.differences import differences_of
from stepquant.runtime.layers.input_error import input_error
from stepquant.runtime.layers.prepared import PreparedPart
from stepquant.runtime.ops.encoding import encode
from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.layer_spec import LayerSpec


class Branches(Protocol):
    """Float branches beside a layer (`runtime.layers.lora_branch`)."""

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """`y`, what the layer gave for `x`, with all branches."""
        ...


class IntegerLayer(nn.Module):
    """What the packed linear and conv layers share.

    Buffers, for `P` input parts, `T` rows (1 or the length of the step grid):
    `weight_packed` uint8 `[bytes]` (the parts one after another, `numerics.packing`'s bit order),
    `weight_scale` float32 `[P, C_out]`, `weight_zero_point` uint8 `[P, C_out]` (twice the zero
    point where the spec says `half_zero_points`), `channel_bits` uint8 `[C_out]` or absent,
    `act_scale` float32 `[P, T]`, `act_zero_point` uint8 `[P, T]`, `bias` float32 `[C_out]` or
    absent, `step_bias` float32 `[T, C_out]` or absent (added to `bias` at each step),
    `act_channel_scale` float32 `[C_in]` or absent (the input is divided by it). What is kept of the
    weight between calls, see `runtime.layers.resident`.
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
        """Empty buffers of the right shapes, for `load_state_dict` or `simulation.packing`."""
        super().__init__()
        check_bits(spec.weight_bits, "weight bits")
        check_bits(spec.activation_bits, "activation bits")
        self.spec, self.splits, self.steps, self.context = spec, splits, steps, context
        self.backend, self.memory = "auto", "fast"
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
        self.lora = None  # a module where there is something, see `runtime.layers.lora_branch`

    def part_specs(self) -> list[LayerSpec]:
        """The spec of each input part."""
        return [replace(self.spec, in_channels=channels) for channels in self.splits]

    def part_differences(self, index: int) -> Tensor:
        """`weight_differences` of one input part, on the device of the layer."""
        parts = self.part_specs()
        start = sum(part.packed_bytes for part in parts[:index])
        packed = resident.packed_bytes(self)[start : start + parts[index].packed_bytes]
        zero_point = self.weight_zero_point[index]
        return differences_of(packed, zero_point, self.channel_bits, parts[index])

    def weight_differences(self) -> list[Tensor]:
        """`code - zero point` of each part, int8 `[C_out, C_part, kh, kw]` (linear: two dims).

        In half steps, `2 * code - 2 * zero point`, where the spec says `half_zero_points`.
        """
        return [self.part_differences(index).cpu() for index in range(len(self.splits))]

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
        device, scales = self.weight_scale.device, self.difference_scales()
        self.weight_packed = resident.packed_bytes(self)
        prepared, start = [], 0
        for index, part in enumerate(self.part_specs()):
            name, kernel, reasons = kernels.choose(part, device, self.backend)
            weight, *rest = kernel.prepare(self.part_differences(index), scales[index], part)
            factors = None
            if self.act_channel_scale is not None:
                factors = 1.0 / self.act_channel_scale[start : start + part.in_channels]
            grid = Grid(
                self.act_scale[index],
                self.act_zero_point[index],
                None,
                max_code(self.spec.activation_bits),
                factors,
            )
            kept = weight if self.memory == "fast" else None
            prepared.append(
                PreparedPart(index, part, name, kernel, reasons, kept, tuple(rest), grid, start)
            )
            start += part.in_channels
        self._prepared, self._prepared_on = prepared, device
        if self.memory == "fast":
            resident.release(self, prepared)

    def prepared_parts(self) -> list[PreparedPart]:
        """The parts, prepared on the device where the tensors are now.

        accelerate's hooks put tensors on another device without asking the module.
        """
        scale = self._buffers["weight_scale"]  # asked at every call: quicker than the attribute
        assert scale is not None
        if self._prepared is None or self._prepared_on != scale.device:
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
        parts = self.prepared_parts()
        if x.dtype in codes.FLOATS and codes.why_not(self) is None:
            return codes.run(self, codes.encode(self, x), dtype=x.dtype)
        states = [resident.state_of(self, part) for part in parts]
        rows = self.context.rows.to(x.device)
        if self.steps == 1:
            return self._run(states, x, torch.zeros_like(rows[:1])).to(x.dtype)
        if rows.numel() == 1:
            return self._run(states, x, rows).to(x.dtype)
        if torch.compiler.is_compiling():
            # A graph cannot ask which rows are alike: one kernel call for each, same numbers.
            pieces = x.split(neighbours(rows, x.shape[0]))
            found = [self._run(states, each, rows[b : b + 1]) for b, each in enumerate(pieces)]
            return torch.cat(found).to(x.dtype)
        # Samples at different steps: one kernel call for each distinct row.
        rows = spread_rows(rows, x.shape[0])
        y: Tensor | None = None
        for row in rows.unique():
            members = rows == row
            of_row = self._run(states, x[members], row.view(1))
            if y is None:
                y = of_row.new_empty((x.shape[0], *of_row.shape[1:]))
            y[members] = of_row
        assert y is not None
        return y.to(x.dtype)

    def _run(self, states: list[tuple[Tensor, ...]], x: Tensor, row: Tensor) -> Tensor:
        """Every sample of `x` at step row `row [1]`; `states`: what the parts' kernels run on."""
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
            part = prepared.grid.scaled(part, self.channel_dim)
            codes = encode(part, scale, zero_point, self.spec.activation_bits)
            y = prepared.kernel.run(
                states[index],
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
        return input_error(self, x)

    def _apply(self, fn: Any, recurse: bool = True) -> IntegerLayer:
        resident.restore(self)  # the kernel's layout belongs to the old device

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # Scales and biases stay float32 in a bf16 or fp16 model.
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars:  # else torch detaches, which makes the bytes
            destination[f"{prefix}weight_packed"] = resident.packed_bytes(self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        resident.restore(self)
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A copy lays its weight out anew: the kernel's layout cannot be copied.
        buffers = {**self._buffers, "weight_packed": resident.packed_bytes(self)}
        return {**self.__dict__, "_buffers": buffers, "_prepared": None}

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        spec = self.spec
        return (
            f"{spec.in_channels}, {spec.out_channels}, weight_bits={spec.weight_bits}, "
            f"activation_bits={spec.activation_bits}, steps={self.steps}, parts={self.splits}"
        )


def is_packed(model: nn.Module) -> bool:
    """Whether `model` has packed layers."""
    return any(isinstance(module, IntegerLayer) for module in model.modules())


class IntegerLinear(IntegerLayer):
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


class IntegerConv2d(IntegerLayer):
    """Packed `nn.Conv2d` with zero padding and one group; inputs `[B, C_in, H, W]`."""

    channel_dim = 1


OLD_NAMES = {
    "PackedLayer": "IntegerLayer",
    "PackedLinear": "IntegerLinear",
    "PackedConv2d": "IntegerConv2d",
}


def __getattr__(name: str) -> Any:
    if name not in OLD_NAMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    new = OLD_NAMES[name]
    warnings.warn(f"{name} is called {new} now", DeprecationWarning, stacklevel=2)
    return globals()[new]
