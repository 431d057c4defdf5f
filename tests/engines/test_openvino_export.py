"""The export modules against the packed layers that they come from, in torch: same codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layer_cases import assert_agrees, input_for, layers, seeded
from stepquant.engines import openvino_export
from stepquant.engines.openvino_export import ExportLayer, export_denoiser
from stepquant.models.surgery import replace_modules
from stepquant.quantizers import StepContext
from stepquant.runtime.layers.integer_attention import PackedAttention
from stepquant.runtime.layers.lora_branch import LoraBranch, attach_branch
from stepquant.simulation.packing import pack_layer
from stepquant.support.errors import StepQuantError

TIMES = [0, 40, torch.tensor([40, 0, 10])]


@layers
@pytest.mark.parametrize("splits", [(12,), (7, 5)], ids=["whole", "parts"])
@pytest.mark.parametrize("steps", [5, 1], ids=["steps", "static"])
@torch.no_grad()
def test_an_exported_layer_gives_what_the_packed_one_does(
    kind: str, splits: tuple[int, ...], steps: int, simulate: Any
) -> None:
    packed = pack_layer(simulate(seeded(kind), 4, 8, splits, steps))
    packed.backend = "reference"
    exported, x = ExportLayer(packed), input_for(kind)
    for timestep in TIMES:
        packed.context.set_timestep(timestep)
        assert_agrees(exported(x), packed(x), 1e-6)


@layers
@torch.no_grad()
def test_channel_scales_step_biases_and_few_bits(kind: str, simulate: Any) -> None:
    layer = simulate(seeded(kind), 2, 3, (7, 5))
    layer.multiply_channel_scale(torch.linspace(0.3, 3, 12))
    packed, x = pack_layer(layer), input_for(kind)
    packed.step_bias = torch.randn(5, 8)
    exported = ExportLayer(packed)
    for timestep in TIMES:
        packed.context.set_timestep(timestep)
        assert_agrees(exported(x), packed(x), 1e-6)


@torch.no_grad()
def test_equal_rows_are_one_row(simulate: Any) -> None:
    packed = pack_layer(simulate(seeded("linear")))
    assert ExportLayer(packed).steps == 5
    packed.act_scale.fill_(0.1)
    packed.act_zero_point.fill_(7)
    assert ExportLayer(packed).steps == 1


@torch.no_grad()
def test_the_error_of_the_input_is_left_with_the_bypass(simulate: Any) -> None:
    class Keeps:
        error: Tensor

        def take(self, error: Tensor) -> None:
            self.error = error

    layer = simulate(seeded("conv3x3"), 4, 4, (7, 5))
    layer.multiply_channel_scale(torch.linspace(0.3, 3, 12))
    packed, x = pack_layer(layer), input_for("conv3x3")
    packed.bypass = Keeps()
    exported = ExportLayer(packed)
    exported(x)
    assert_agrees(packed.bypass.error, packed.input_error(x), 1e-6)


class Denoiser(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, nn.GroupNorm(2, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.norm(self.layer(sample))


@pytest.fixture
def denoiser(simulate: Any, context: StepContext) -> Denoiser:
    """With few enough bits for every CPU."""
    built = Denoiser(pack_layer(simulate(seeded("conv3x3"), 4))).eval()
    context.attach(built)
    return built


@torch.no_grad()
def test_a_copy_is_exported_and_takes_its_rows_from_the_context(denoiser: Denoiser) -> None:
    exported, context = export_denoiser(denoiser)
    x = input_for("conv3x3")
    expected = denoiser(x, torch.tensor(30))
    context.rows = torch.tensor([3])
    assert_agrees(exported(x, torch.tensor(0)), expected)
    assert denoiser.layer is not exported.layer and context is not denoiser.layer.context


def refused(denoiser: nn.Module) -> str:
    with pytest.raises(StepQuantError) as error:
        export_denoiser(denoiser)
    return str(error.value)


def test_what_cannot_run_is_refused_by_name(denoiser: Denoiser, context: StepContext) -> None:
    assert refused(nn.Sequential(nn.Linear(2, 2))).startswith("Sequential has no packed layer: exp")
    attach_branch(
        denoiser.layer, "ink", LoraBranch(torch.ones(1, 12, 3, 3), torch.ones(8, 1, 1, 1), 1.0, 1.0)
    )
    assert refused(denoiser).startswith("the layer 'layer' has the LoRA 'ink': expected none")


def test_a_log2_grid_is_refused_by_the_name_of_its_attention(
    denoiser: Denoiser, context: StepContext
) -> None:
    denoiser.attention = PackedAttention(8, 8, 5, context)
    export_denoiser(denoiser)
    denoiser.attention.probability_log2[1] = 1
    told = refused(denoiser)
    assert told.startswith("the attention 'attention' has probabilities on the log2 grid in 1 of 5")


def test_other_dtypes_and_offloading_are_refused(denoiser: Denoiser) -> None:
    assert "is in torch.bfloat16: expected float32" in refused(denoiser.to(torch.bfloat16))
    denoiser.to(torch.float32)._hf_hook = object()
    assert refused(denoiser).startswith("Denoiser is offloaded by accelerate")


@pytest.mark.parametrize("saturates", [True, False])
def test_many_bits_are_refused_on_a_cpu_whose_kernels_saturate(
    saturates: bool, denoiser: Denoiser, simulate: Any, context: StepContext, monkeypatch: Any
) -> None:
    monkeypatch.setattr(openvino_export, "_saturates", lambda spec: saturates)
    export_denoiser(denoiser)
    denoiser.layer = pack_layer(simulate(seeded("conv3x3"), 8, 8))
    context.attach(denoiser)
    if saturates:
        assert refused(denoiser).startswith("the layer 'layer' is w8a8 and this CPU has no VNNI")
    else:
        export_denoiser(denoiser)


def test_no_module_stays_packed(denoiser: Denoiser) -> None:
    exported, _ = export_denoiser(denoiser)
    kinds: list[str] = []
    replace_modules(exported, lambda _, module: kinds.append(type(module).__name__))
    assert kinds == ["ExportLayer", "GroupNorm"]
