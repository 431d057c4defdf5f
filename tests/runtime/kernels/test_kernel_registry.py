"""Kernels from outside the package: registered, chosen, and run by a layer."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fake_packages import install
from layer_cases import input_for, seeded
from stepquant.api import set_memory_mode
from stepquant.engines.backend import set_backend
from stepquant.runtime.kernels import choose, register_kernel, registered_kernels, registry
from stepquant.runtime.kernels.reference import REFERENCE, ReferenceKernel
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.simulation.packing import pack_layer
from stepquant.support.errors import StepQuantError
from stepquant.support.plugins import PlugIns
from stepquant.support.refusal import Refusal, RefusalCode

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def registered_for_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))


class Doubled(ReferenceKernel):
    """Computes twice what it should, so that a test sees it."""

    name: ClassVar[str] = "doubled"
    device_types: ClassVar[tuple[str, ...]] = ("cpu",)

    def why_not(self, spec: LayerSpec, device: torch.device) -> Refusal | None:
        if spec.kind != "linear":
            return Refusal(RefusalCode.SHAPE, "takes linear layers")
        return None

    def run(self, *arguments: object) -> Tensor:
        return 2 * super().run(*arguments)


def test_our_own_kernels_in_order_of_preference() -> None:
    assert list(registered_kernels()) == ["native", "onednn", "int_mm", "reference"]
    assert list(registered_kernels("cuda")) == ["int_mm", "reference"]
    assert list(registered_kernels("cpu")) == ["native", "onednn", "reference"]


@pytest.mark.parametrize("mode", ["fast", "low"])
@torch.no_grad()
def test_a_layer_runs_on_a_kernel_that_was_registered(mode: str, simulate) -> None:
    register_kernel(priority=1)(Doubled)
    layer, x = pack_layer(simulate(seeded("linear-no-bias"), splits=(7, 5))), input_for("linear")
    layer.context.set_timestep(20)
    set_memory_mode(layer, mode)
    set_backend(layer, "reference")
    expected = layer(x)
    set_backend(layer, "doubled")
    assert layer.kernel_names() == ["doubled", "doubled"]
    found = layer(x)
    # Each part doubles what it is handed, and the second one only its own share.
    assert not torch.allclose(found, expected)
    one = pack_layer(simulate(seeded("linear-no-bias")))
    one.context.set_timestep(20)
    set_backend(one, "reference")
    expected = one(x)
    set_backend(one, "doubled")
    torch.testing.assert_close(one(x), 2 * expected)


@torch.no_grad()
def test_auto_prefers_the_highest_priority(simulate) -> None:
    register_kernel(priority=1000)(Doubled)
    assert next(iter(registered_kernels())) == "doubled"
    layer = pack_layer(simulate(seeded("linear")))
    assert layer.kernel_names() == ["doubled"]
    assert layer.why_no_codes() == Refusal(RefusalCode.OTHER_KERNEL, "the kernel doubled")
    assert layer(input_for("linear")).shape == (3, 5, 8)
    conv = pack_layer(simulate(seeded("conv3x3")))
    assert conv.prepared_parts()[0].weight.reasons[0] == "doubled: takes linear layers"
    assert conv.kernel_names() != ["doubled"]


def test_a_layer_that_the_kernel_does_not_take_runs_on_the_reference(simulate) -> None:
    register_kernel(priority=1)(Doubled)
    choice = choose(LayerSpec("conv2d", 8, 8, 4, 8), CPU, "doubled")
    assert choice.kernel is REFERENCE and choice.reasons == ["doubled: takes linear layers"]


@pytest.mark.parametrize("name", ["auto", "fastest", "openvino", "openvino:GPU"])
def test_names_of_other_backends_are_taken(name: str) -> None:
    with pytest.raises(StepQuantError, match=f"a kernel is called '{name}': expected another"):
        register_kernel(priority=1)(type("Taken", (Doubled,), {"name": name}))


def test_a_name_is_taken_once() -> None:
    register_kernel(priority=1)(Doubled)
    register_kernel(priority=2)(Doubled)  # the same class again, as reloading does
    with pytest.raises(StepQuantError, match="two kernels called 'doubled', Doubled and Other"):
        register_kernel(priority=1)(type("Other", (Doubled,), {}))


def test_an_unknown_backend_names_those_that_are_registered() -> None:
    register_kernel(priority=1)(Doubled)
    with pytest.raises(StepQuantError, match=r"int_mm, doubled, reference"):
        choose(LayerSpec("linear", 8, 8, 4, 8), CPU, "cpu")


OF_A_PACKAGE = """
from stepquant.runtime.kernels import register_kernel
from stepquant.runtime.kernels.reference import ReferenceKernel

@register_kernel(priority=1)
class Packaged(ReferenceKernel):
    name = "packaged"
"""
BROKEN = "raise RuntimeError('no such library')\n"


def test_an_installed_package_adds_kernels_and_a_broken_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = "stepquant.kernels"
    install(tmp_path, "kernels_of_mine", {"packaged": "kernels_of_mine"}, group, OF_A_PACKAGE)
    install(tmp_path, "kernels_broken", {"broken": "kernels_broken"}, group, BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "PLUG_INS", PlugIns("kernel", group))
    registry._import_plug_ins.cache_clear()
    with pytest.warns(UserWarning, match=r"'kernels_broken' 1\.0 .*RuntimeError: no such library"):
        found = registered_kernels()
    registry._import_plug_ins.cache_clear()
    assert "packaged" in found and "broken" not in found
