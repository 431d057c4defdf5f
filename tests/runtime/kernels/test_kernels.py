"""Every kernel is exact: with scales 1 its float32 result is the int64 sum."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import stepquant
from kernel_cases import CASES, Case, actual, expected
from stepquant.runtime.kernels import onednn, onednn_operators, registered_kernels
from stepquant.runtime.kernels.onednn import ONEDNN, CallConstants
from stepquant.runtime.ops.encoding import pad
from stepquant.runtime.ops.layer_spec import LayerSpec

KERNELS = registered_kernels()
CPU = torch.device("cpu")
CUDA = torch.device("cuda")
NAMES = {case.name: case for case in CASES}
LINEAR, CONV = NAMES["linear-w8"].spec, NAMES["conv-w8"].spec
NO_ONEDNN = ONEDNN.why_not(LINEAR, CPU)
# Each cap, the CPU's flag that it needs to be that very instruction set, and whether kernels for it
# add pairs of products in int16.
CAPS = {
    "AVX2": ("avx2", True),
    "AVX512_CORE": ("avx512bw", True),
    "AVX512_CORE_VNNI": ("avx512_vnni", False),
    "AVX2_VNNI": ("avx_vnni", False),
}

needs_onednn = pytest.mark.skipif(NO_ONEDNN is not None, reason=f"no oneDNN kernels: {NO_ONEDNN}")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def check_exact(kernel: str, case: Case, device: str = "cpu") -> None:
    y, sums = actual(kernel, case, device), expected(case)
    assert y.dtype == torch.float32 and y.shape == sums.shape
    assert torch.equal(y.cpu().double(), sums.double())


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_reference_is_exact(case: Case) -> None:
    check_exact("reference", case)


@needs_onednn
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_onednn_is_exact(case: Case) -> None:
    check_exact("onednn", case)


WITHOUT_DILATION = [case for case in CASES if case.spec.dilation == (1, 1)]


# Capping oneDNN bypasses torch's own check of the CPU, so that `_int_mm` saturates there. That is
# an artefact of the cap: a real CPU without VNNI gets an exact, slower path.
@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" in os.environ, reason="`_int_mm` saturates under a cap")
@pytest.mark.parametrize("case", WITHOUT_DILATION, ids=lambda case: case.name)
def test_int_mm_is_exact_on_the_cpu(case: Case) -> None:
    check_exact("int_mm", case)


@needs_cuda
@pytest.mark.parametrize("kernel", ["int_mm", "reference"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_kernels_are_exact_on_cuda(case: Case, kernel: str) -> None:
    reason = KERNELS[kernel].why_not(case.spec, CUDA)
    if reason:
        pytest.skip(str(reason))
    check_exact(kernel, case, "cuda")


def test_cases_hold_what_they_are_for() -> None:
    """Extreme codes and weights are in there, or the tests above would show little."""
    inputs = [case.inputs() for case in CASES]
    assert min(int(each["weight"].min()) for each in inputs) == -128
    assert max(int(each["weight"].max()) for each in inputs) == 127
    assert {case.spec.weight_bits for case in CASES} == set(range(1, 9))
    assert not NAMES["conv3x3-24-17-strided"].inputs()["codes"].is_contiguous()
    # float32 holds every whole number up to 2^24, so that the comparison is exact.
    assert max(int(expected(case).abs().max()) for case in CASES) < 2**24


@pytest.fixture(scope="module")
def under_caps() -> dict[str, dict[str, Any]]:
    """What `kernel_cases.py` finds under each cap."""
    package = str(Path(stepquant.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parents[2] / "helpers" / "kernel_cases.py"), *CAPS],
        env={**os.environ, "PYTHONPATH": package},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    return {record["cap"]: record for record in records}


@needs_onednn
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the check forks")
@pytest.mark.parametrize("cap", CAPS)
def test_onednn_is_exact_under_a_capped_instruction_set(
    cap: str, under_caps: dict[str, dict[str, Any]]
) -> None:
    record = under_caps[cap]
    assert record["checked"] == len(CASES) and record["wrong"] == []
    flag, saturates = CAPS[cap]
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or flag not in flags.read_text().split():
        return  # the CPU lacks this instruction set: oneDNN took a lesser one
    assert record["pairs_saturate"] == saturates
    # Where pairs saturate, one pass over full-range codes is wrong, for linear and conv alike: the
    # exact results above came from the two halves. Nowhere else is it wrong.
    wrong = record["wrong_in_one_pass"]
    if saturates:
        assert {"linear-80-40-extreme", "conv3x3-24-24-extreme"} <= set(wrong)
        assert all(NAMES[name].spec.pair_overflows_int16 for name in wrong)
    else:
        assert wrong == []


@needs_onednn
@pytest.mark.parametrize(
    "name",
    [
        "linear-w8-extreme",
        "conv3x3-24-24-extreme-zero-max",
        "conv3x3-17-3-accumulate",
        "linear-17-24",
    ],
)
def test_two_halves_are_exact_on_every_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "pairs_saturate", lambda: True)
    check_exact("onednn", NAMES[name])


@pytest.mark.parametrize("kernel", ["reference", "native", "onednn", "int_mm"])
@pytest.mark.parametrize("name", ["linear-17-24", "conv3x3-17-3-accumulate"])
def test_scales_are_applied_per_tensor_and_out_channel(name: str, kernel: str) -> None:
    reason = KERNELS[kernel].why_not(NAMES[name].spec, CPU)
    if reason and kernel in ("native", "onednn"):
        pytest.skip(str(reason))
    case = NAMES[name]
    inputs, spec = case.inputs(), case.spec
    before = {key: value.clone() for key, value in inputs.items()}
    act_scale, weight_scale = torch.tensor([0.0371]), 0.01 * torch.arange(1, spec.out_channels + 1)
    state = KERNELS[kernel].prepare(inputs["weight"], weight_scale, spec)
    y = KERNELS[kernel].run(
        state,
        inputs["codes"],
        act_scale,
        torch.tensor([128], dtype=torch.int32),
        inputs["bias"],
        inputs["accumulate"],
        spec,
    )
    shape = (1, -1, 1, 1) if spec.kind == "conv2d" else (-1,)
    bias, accumulate = inputs["bias"].double().view(shape), inputs["accumulate"].double()
    sums = expected(case).double() - bias - accumulate
    oracle = sums * act_scale.double() * weight_scale.double().view(shape) + bias + accumulate
    torch.testing.assert_close(y.double(), oracle, rtol=1e-6, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in inputs.items())


@needs_onednn
@pytest.mark.parametrize(
    "name",
    [
        "conv3x3-24-24-stride-2-2",
        "conv5x3-17-17-stride-1-2",
        "conv3x3-1-3-dilation-2-1",
        "conv1x1-1-1",
        "linear-w4",
    ],
)
def test_operators_tell_torch_compile_the_truth_about_their_results(name: str) -> None:
    """The shape, dtype and strides that `torch.compile` plans with are those that come."""
    case = NAMES[name]
    inputs, spec = case.inputs(), case.spec
    packed, scale, zeros, _ = ONEDNN.prepare(inputs["weight"], torch.ones(spec.out_channels), spec)
    zero_point = torch.tensor([3], dtype=torch.int32)
    weight = (packed, scale, zeros)
    if spec.kind == "linear":
        arguments = (inputs["codes"], torch.ones(1), zero_point, *weight, None)
        real = torch.ops.stepquant.linear_u8s8(*arguments)
        planned = onednn_operators._linear_shape(*arguments)
    else:
        bias = torch.zeros(spec.out_channels)
        geometry = (spec.kernel_size, spec.stride, spec.padding, spec.dilation)
        arguments = (inputs["codes"], torch.ones(1), zero_point, *weight, bias, *geometry)
        real = torch.ops.stepquant.conv2d_u8s8(*arguments)
        planned = onednn_operators._conv2d_shape(*arguments)
    assert (planned.shape, planned.dtype) == (real.shape, real.dtype)
    assert planned.stride() == real.stride()


@needs_onednn
@pytest.mark.parametrize("name", ["conv3x3-24-24-stride-2-2", "linear-w4"])
def test_onednn_gives_no_samples_for_none(name: str) -> None:
    spec = NAMES[name].spec
    channels = torch.ones(spec.out_channels)
    state = ONEDNN.prepare(torch.ones(spec.weight_shape, dtype=torch.int8), channels, spec)
    shape = (0, spec.in_channels, 9, 7) if spec.kind == "conv2d" else (0, 5, spec.in_channels)
    codes = torch.zeros(shape, dtype=torch.uint8)
    constants = CallConstants(1.0, 0, channels)
    y = onednn.run_codes(state, codes, constants, spec, None, False, torch.float32)
    assert y.shape == ((0, 24, 4, 3) if spec.kind == "conv2d" else (0, 5, spec.out_channels))


@needs_onednn
@pytest.mark.parametrize("name", ["linear-w8-extreme", "conv3x3-24-24-extreme"])
def test_onednn_does_not_run_codes_in_one_pass_where_pairs_saturate(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "pairs_saturate", lambda: True)
    case = NAMES[name]
    inputs, channels = case.inputs(), torch.ones(case.spec.out_channels)
    state = ONEDNN.prepare(inputs["weight"], channels, case.spec)
    constants = CallConstants(1.0, 0, channels)
    with pytest.raises(AssertionError, match="one pass of oneDNN's kernel saturates"):
        onednn.run_codes(state, inputs["codes"], constants, case.spec, None, False, torch.float32)


def test_pad_surrounds_the_codes_with_the_zero_point() -> None:
    codes = torch.arange(12, dtype=torch.uint8).reshape(1, 2, 2, 3)
    padded = pad(codes, torch.tensor([200], dtype=torch.int32), (1, 2))
    assert padded.dtype == torch.uint8
    assert padded.is_contiguous(memory_format=torch.channels_last)
    expected = torch.nn.functional.pad(codes, (2, 2, 1, 1), value=200)
    assert torch.equal(padded, expected)


@needs_onednn
@pytest.mark.parametrize("bits", [4, 8])
def test_one_sided_weights_and_a_high_zero_point_cost_little_precision(bits: int) -> None:
    """The zero point's share, far larger than the result, is taken off in float32."""
    generator = torch.Generator().manual_seed(3)
    spec = LayerSpec("conv2d", 256, 8, bits, 8, (3, 3), padding=(1, 1))
    codes = torch.randint(0, 256, (2, 256, 6, 6), generator=generator, dtype=torch.uint8)
    weight = torch.randint(0, 2 ** (bits - 1), (8, 256, 3, 3), generator=generator)
    scale, weight_scale = torch.tensor([0.013]), torch.rand(8, generator=generator) + 0.1
    state = ONEDNN.prepare(weight.to(torch.int8), weight_scale, spec)
    y = ONEDNN.run(state, codes, scale, torch.tensor([255], dtype=torch.int32), None, None, spec)
    oracle = torch.nn.functional.conv2d((codes.double() - 255), weight.double(), padding=1)
    oracle = oracle * scale.double() * weight_scale.double().view(1, -1, 1, 1)
    assert (y - oracle).abs().max() < 1e-6 * oracle.abs().max()


def test_int_mm_keeps_the_zero_point_on_its_device() -> None:
    """Nothing is read back: the whole kernel is one graph."""
    case = NAMES["conv3x3-17-3-accumulate"]
    compiled = torch.compile(lambda: actual_from(case, inputs), backend="eager", fullgraph=True)
    inputs = case.inputs()
    assert torch.equal(compiled().double(), expected(case).double())


def actual_from(case: Case, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """`kernel_cases.actual` for int_mm, with inputs that exist already."""
    kernel = KERNELS["int_mm"]
    state = kernel.prepare(inputs["weight"], torch.ones(case.spec.out_channels), case.spec)
    zero_point = torch.full((1,), case.act_zero_point, dtype=torch.int32)
    return kernel.run(
        state,
        inputs["codes"],
        torch.ones(1),
        zero_point,
        inputs["bias"],
        inputs["accumulate"],
        case.spec,
    )
