"""Layers for the kernels to be exact on, and an int64 reference that shares no code with them.

Also a program, `python kernel_cases.py CAP...`, which runs the oneDNN kernels over all cases under
each cap as `ONEDNN_MAX_CPU_ISA` and prints what it found, one line of JSON for each. oneDNN reads
the cap once per process, at its first use, so each cap gets a fork of this one.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepquant.numerics import WEIGHT_ZERO_POINT_8BIT, max_code
from stepquant.runtime.kernels import onednn, registered_kernels
from stepquant.runtime.ops.layer_spec import LayerSpec


@dataclass(frozen=True)
class Case:
    """One layer, its input and what is called with it."""

    name: str
    spec: LayerSpec
    size: tuple[int, ...]  # of the input, without its channels: (B, H, W), or (B, ...) for linear
    act_zero_point: int
    extreme: bool = False  # the largest codes and the largest weights of one sign
    layout: str = "contiguous"  # or "channels_last", "strided"
    bias: bool = False
    accumulate: bool = False

    def inputs(self) -> dict[str, Any]:
        """Codes, weight differences, bias and accumulator; whole numbers all of them."""
        generator = torch.Generator().manual_seed(17)
        spec, largest = self.spec, max_code(self.spec.activation_bits)

        def integers(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
            return torch.randint(low, high + 1, shape, generator=generator)

        channels = spec.in_channels
        shape = (*self.size, channels)
        if spec.kind == "conv2d":
            shape = (self.size[0], channels, *self.size[1:])
        codes = integers(0, largest, shape).to(torch.uint8)
        weight_shape = (spec.out_channels, channels)
        if spec.kind == "conv2d":
            weight_shape += spec.kernel_size
        if spec.weight_bits == 8:
            weight = integers(0, 255, weight_shape) - WEIGHT_ZERO_POINT_8BIT
        else:
            zero_point = integers(0, max_code(spec.weight_bits), (spec.out_channels,))
            zero_point = zero_point.view(-1, *(1,) * (len(weight_shape) - 1))
            weight = integers(0, max_code(spec.weight_bits), weight_shape) - zero_point
        if self.extreme:
            codes.fill_(largest)
            weight[0::2] = 127 if spec.weight_bits == 8 else spec.largest_weight
            weight[1::2] = -spec.largest_weight
        if self.layout == "channels_last":
            codes = codes.contiguous(memory_format=torch.channels_last)
        elif self.layout == "strided":
            wide = codes.new_zeros((*codes.shape[:-1], 2 * codes.shape[-1] + 1))
            wide[..., 1::2] = codes
            codes = wide[..., 1::2]
        bias = integers(-1000, 1000, (spec.out_channels,)).float() if self.bias else None
        accumulate = None
        if self.accumulate:
            out = int64_reference(codes, weight, self.act_zero_point, spec).shape
            accumulate = integers(-1000, 1000, tuple(out)).float()
        return {
            "codes": codes,
            "weight": weight.to(torch.int8),
            "bias": bias,
            "accumulate": accumulate,
        }


def int64_reference(codes: Tensor, weight: Tensor, zero_point: int, spec: LayerSpec) -> Tensor:
    """`sum((codes - zero_point) * weight)` in int64, a conv as a sum over its kernel's taps."""
    difference, weight = codes.to(torch.int64) - zero_point, weight.to(torch.int64)
    if spec.kind == "linear":
        return (difference.unsqueeze(-2) * weight).sum(dim=-1)
    batch, channels, height, width = difference.shape
    (ph, pw), (kh, kw) = spec.padding, spec.kernel_size
    (sh, sw), (dh, dw) = spec.stride, spec.dilation
    padded = difference.new_zeros(batch, channels, height + 2 * ph, width + 2 * pw)
    padded[:, :, ph : ph + height, pw : pw + width] = difference
    rows = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    columns = (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    total = difference.new_zeros(batch, weight.shape[0], rows, columns)
    for i, j in itertools.product(range(kh), range(kw)):
        top, left = i * dh, j * dw
        seen = padded[
            :, :, top : top + (rows - 1) * sh + 1 : sh, left : left + (columns - 1) * sw + 1 : sw
        ]
        total += (seen.unsqueeze(1) * weight[None, :, :, i, j, None, None]).sum(dim=2)
    return total


def expected(case: Case) -> Tensor:
    """What every kernel must give for `case` with all scales 1, int64."""
    inputs = case.inputs()
    y = int64_reference(inputs["codes"], inputs["weight"], case.act_zero_point, case.spec)
    if inputs["bias"] is not None:
        shape = (1, -1, 1, 1) if case.spec.kind == "conv2d" else (-1,)
        y = y + inputs["bias"].to(torch.int64).view(shape)
    if inputs["accumulate"] is not None:
        y = y + inputs["accumulate"].to(torch.int64)
    return y


def actual(kernel_name: str, case: Case, device: str = "cpu") -> Tensor:
    """What the kernel gives for `case` with all scales 1, float32."""
    kernel = registered_kernels()[kernel_name]
    inputs = {
        name: None if value is None else value.to(device) for name, value in case.inputs().items()
    }
    ones = torch.ones(case.spec.out_channels, device=device)
    zero_point = torch.tensor([case.act_zero_point], dtype=torch.int32, device=device)
    state = kernel.prepare(inputs["weight"], ones, case.spec)
    return kernel.run(
        state,
        inputs["codes"],
        ones[:1],
        zero_point,
        inputs["bias"],
        inputs["accumulate"],
        case.spec,
    )


def one_pass_is_exact(case: Case) -> bool:
    """Whether oneDNN is exact on `case` where full-range codes are not run as two halves."""
    inputs, spec = case.inputs(), case.spec
    state = onednn.ONEDNN.prepare(inputs["weight"], torch.ones(spec.out_channels), spec)
    zero_point = torch.tensor([case.act_zero_point], dtype=torch.int32)
    y = onednn.one_call(
        state,
        inputs["codes"],
        torch.ones(1),
        zero_point,
        inputs["bias"],
        inputs["accumulate"],
        spec,
    )
    return torch.equal(y.double(), expected(case).double())


def _linear(name: str, inputs: int, out: int, size: tuple[int, ...], **changes: Any) -> Case:
    bits = {key: changes.pop(key, 8) for key in ("weight_bits", "activation_bits")}
    zero_point = changes.pop("zero_point", 128)
    return Case(name, LayerSpec("linear", inputs, out, **bits), size, zero_point, **changes)


def _conv(
    name: str,
    channels: tuple[int, int],
    kernel: tuple[int, int],
    size: tuple[int, int, int],
    **changes: Any,
) -> Case:
    geometry = {
        key: changes.pop(key) for key in ("stride", "padding", "dilation") if key in changes
    }
    bits = {key: changes.pop(key, 8) for key in ("weight_bits", "activation_bits")}
    zero_point = changes.pop("zero_point", 128)
    spec = LayerSpec("conv2d", *channels, **bits, kernel_size=kernel, **geometry)
    return Case(name, spec, size, zero_point, **changes)


def _cases() -> list[Case]:
    cases = [
        _linear("linear-1-1", 1, 1, (1,)),
        _linear("linear-17-24", 17, 24, (5,), bias=True, accumulate=True),
        _linear("linear-3-17-tokens", 3, 17, (2, 7), bias=True),
        _linear("linear-24-3-strided", 24, 3, (2, 3, 5), layout="strided", accumulate=True),
        _linear("linear-80-40-extreme", 80, 40, (33,), extreme=True, zero_point=0),
        _linear(
            "linear-80-40-extreme-a7", 80, 40, (3,), extreme=True, activation_bits=7, zero_point=0
        ),
        _linear("linear-64-64-a4", 64, 64, (40,), activation_bits=4, zero_point=5),
        _conv("conv1x1-1-1", (1, 1), (1, 1), (1, 7, 5)),
        _conv("conv1x1-17-24", (17, 24), (1, 1), (2, 7, 5), bias=True),
        _conv("conv1x1-24-8-one-pixel", (24, 8), (1, 1), (3, 1, 1)),
        _conv("conv3x3-3-17", (3, 17), (3, 3), (2, 7, 5), padding=(1, 1), bias=True),
        _conv(
            "conv3x3-17-3-accumulate",
            (17, 3),
            (3, 3),
            (2, 7, 5),
            padding=(1, 1),
            bias=True,
            accumulate=True,
        ),
        _conv(
            "conv3x3-24-24-stride-2-2", (24, 24), (3, 3), (2, 7, 5), stride=(2, 2), padding=(1, 1)
        ),
        # An even size leaves a row over; wide padding gives outputs of padding only.
        _conv("conv3x3-8-16-even", (8, 16), (3, 3), (2, 8, 6), stride=(2, 2), padding=(1, 1)),
        _conv("conv2x2-8-8-wide-padding", (8, 8), (2, 2), (1, 4, 3), padding=(3, 4)),
        _conv("conv3x3-24-1-stride-1-2", (24, 1), (3, 3), (1, 7, 5), stride=(1, 2)),
        _conv("conv5x3-3-24-padding-2-1", (3, 24), (5, 3), (2, 7, 5), padding=(2, 1)),
        _conv(
            "conv5x3-17-17-stride-1-2",
            (17, 17),
            (5, 3),
            (2, 7, 5),
            stride=(1, 2),
            padding=(2, 1),
            layout="channels_last",
        ),
        _conv(
            "conv3x3-24-17-channels-last",
            (24, 17),
            (3, 3),
            (2, 7, 5),
            padding=(1, 1),
            layout="channels_last",
            accumulate=True,
        ),
        _conv(
            "conv3x3-24-17-strided", (24, 17), (3, 3), (2, 7, 5), padding=(1, 1), layout="strided"
        ),
        _conv(
            "conv3x3-17-24-dilation-2", (17, 24), (3, 3), (2, 7, 5), padding=(2, 2), dilation=(2, 2)
        ),
        _conv(
            "conv3x3-1-3-dilation-2-1", (1, 3), (3, 3), (1, 7, 5), padding=(1, 1), dilation=(2, 1)
        ),
        _conv(
            "conv3x3-24-24-extreme",
            (24, 24),
            (3, 3),
            (2, 7, 5),
            padding=(1, 1),
            extreme=True,
            zero_point=0,
        ),
        _conv(
            "conv3x3-24-24-extreme-zero-max",
            (24, 24),
            (3, 3),
            (2, 7, 5),
            padding=(1, 1),
            extreme=True,
            zero_point=255,
        ),
        _conv(
            "conv3x3-3-17-extreme",
            (3, 17),
            (3, 3),
            (1, 7, 5),
            padding=(1, 1),
            extreme=True,
            zero_point=1,
            bias=True,
            accumulate=True,
        ),
        _conv("conv1x1-80-40-extreme", (80, 40), (1, 1), (1, 4, 4), extreme=True, zero_point=77),
    ]
    for zero_point in (0, 1, 127, 255):
        cases.append(_linear(f"linear-zero-{zero_point}", 40, 16, (4,), zero_point=zero_point))
        cases.append(
            _conv(
                f"conv-zero-{zero_point}",
                (16, 16),
                (3, 3),
                (1, 7, 5),
                padding=(1, 1),
                zero_point=zero_point,
            )
        )
    for bits in range(1, 9):
        for extreme in (False, True):
            tail = f"w{bits}{'-extreme' if extreme else ''}"
            cases.append(
                _linear(
                    f"linear-{tail}", 48, 24, (5,), weight_bits=bits, extreme=extreme, zero_point=3
                )
            )
            cases.append(
                _conv(
                    f"conv-{tail}",
                    (17, 24),
                    (3, 3),
                    (2, 7, 5),
                    padding=(1, 1),
                    weight_bits=bits,
                    extreme=extreme,
                    zero_point=200,
                )
            )
    return cases


CASES = _cases()


def check_all(cap: str) -> None:
    """Print `pairs_saturate`, the number of cases, those wrong, and those wrong in one pass."""
    os.environ["ONEDNN_MAX_CPU_ISA"] = cap
    record = {
        "cap": cap,
        "pairs_saturate": onednn.pairs_saturate(),
        "checked": len(CASES),
        "wrong": [
            case.name
            for case in CASES
            if not torch.equal(actual("onednn", case).double(), expected(case).double())
        ],
        "wrong_in_one_pass": [case.name for case in CASES if not one_pass_is_exact(case)],
    }
    print(json.dumps(record), flush=True)


def main() -> None:
    """Check all cases under each cap, one after another."""
    torch.set_num_threads(1)
    for cap in sys.argv[1:]:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                check_all(cap)
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"the check under {cap} failed with status {status}")


if __name__ == "__main__":
    main()
