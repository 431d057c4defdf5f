"""Which kernel a layer gets, and why it does not get another."""

from __future__ import annotations

import platform

import pytest
import torch

from kernel_cases import CASES
from stepquant.runtime.kernels import Backend, choose, registered_kernels
from stepquant.runtime.kernels.native import NATIVE
from stepquant.runtime.kernels.onednn import ONEDNN
from stepquant.runtime.ops import native
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.support.errors import StepQuantError
from stepquant.support.refusal import RefusalCode

KERNELS = registered_kernels()
CPU = torch.device("cpu")
CUDA = torch.device("cuda")
NAMES = {case.name: case for case in CASES}
LINEAR, CONV = NAMES["linear-w8"].spec, NAMES["conv-w8"].spec
NO_ONEDNN = ONEDNN.why_not(LINEAR, CPU)

needs_onednn = pytest.mark.skipif(NO_ONEDNN is not None, reason=f"no oneDNN kernels: {NO_ONEDNN}")


@needs_onednn
def test_auto_takes_our_own_kernel_on_the_cpu_or_else_onednn() -> None:
    refusal = NATIVE.why_not(CONV, CPU)
    choice = choose(CONV, CPU)
    if refusal is None:
        assert choice == (NATIVE, {})
    else:
        assert choice == (ONEDNN, {"native": refusal})
        assert choice.reasons == [f"native: {refusal}"]


@pytest.mark.parametrize(
    ("machine", "fits"),
    [("x86_64", True), ("aarch64", True), ("arm64", True), ("aarch64_be", False), ("s390x", False)],
)
def test_our_own_kernel_knows_its_machines(
    machine: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(native, "why_no_products", lambda: None)
    refusal = NATIVE.why_not(CONV, CPU)
    assert (refusal is None) == fits
    if refusal is not None:
        assert refusal.code is RefusalCode.MACHINE
        assert str(refusal) == f"needs x86-64 or 64-bit ARM, but the machine is {machine}"


def test_auto_on_a_device_that_no_kernel_is_made_for_says_why_it_is_slow() -> None:
    kernel, refusals = choose(LINEAR, torch.device("meta"))
    assert kernel is KERNELS["reference"]
    assert list(refusals) == ["native", "onednn", "int_mm"]
    assert all("meta" in refusal.text for refusal in refusals.values())
    assert {refusal.code for refusal in refusals.values()} == {RefusalCode.DEVICE}


@pytest.mark.parametrize("backend", [*KERNELS, Backend.REFERENCE, Backend.ONEDNN])
def test_a_backend_that_is_asked_for_is_taken_or_the_reason_given(backend: str) -> None:
    choice, reason = choose(LINEAR, CPU, backend), KERNELS[backend].why_not(LINEAR, CPU)
    if reason is None:
        assert choice == (KERNELS[backend], {})
    else:
        assert choice.kernel is KERNELS["reference"]
        assert choice.reasons == [f"{backend}: {reason}"]


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(StepQuantError, match="unknown backend 'cpu': expected auto or one of"):
        choose(LINEAR, CPU, "cpu")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (LayerSpec("linear", 24, 16, 4, 8), None),
        (LayerSpec("linear", 20, 16, 4, 8), "multiples of 8, got 20 and 16"),
        (LayerSpec("conv2d", 3, 16, 4, 8, (3, 3)), "multiples of 8, got 27 and 16"),
        (LayerSpec("conv2d", 8, 3, 4, 8, (3, 3)), "multiples of 8, got 72 and 3"),
        (LayerSpec("conv2d", 8, 8, 4, 8, (3, 3), dilation=(2, 1)), "a dilation of 1, got (2, 1)"),
    ],
    ids=["fits", "in-channels", "columns", "out-channels", "dilation"],
)
def test_why_int_mm_does_not_take_a_layer(spec: LayerSpec, reason: str | None) -> None:
    found = KERNELS["int_mm"].why_not(spec, CUDA)
    assert found is None if reason is None else found is not None and reason in found.text
    assert str(KERNELS["int_mm"].why_not(spec, CPU)) == "needs CUDA, but the layer is on cpu"
    choice = choose(spec, CUDA)
    assert (choice.kernel.name == "int_mm") == (reason is None)
    apart = "needs the CPU, but the layer is on cuda"
    assert choice.reasons[:2] == [f"native: {apart}", f"onednn: {apart}"]
