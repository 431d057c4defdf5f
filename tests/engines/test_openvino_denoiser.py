"""OpenVINO against the packed layers; skipped where it is not installed."""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import architectures
from layer_cases import assert_agrees, input_for, layers, seeded
from openvino_models import Denoiser, around, needs_openvino, needs_vnni
from stepquant.engines.backend import with_backend
from stepquant.engines.openvino_denoiser import OpenVinoDenoiser
from stepquant.models.adapter import adapter_for
from stepquant.pipelines.sampling import sample_images
from stepquant.quantizers import StepContext
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.lora_branch import LoraBranch, attach_branch
from stepquant.simulation.packing import pack_layer, pack_model
from stepquant.support.errors import StepQuantError
from stepquant.verbs.bench import denoiser_call
from stepquant.verbs.quantize import quantize

TIMES = [torch.tensor(0), torch.tensor(40), torch.tensor([40, 0, 10])]


def integers(run: OpenVinoDenoiser) -> int:
    """How many convolutions and matmuls are of integers, if all are."""
    counts = run.kernels()
    assert all(name.endswith("_I8") for name in counts), counts
    return sum(counts.values())


@needs_openvino
@layers
@pytest.mark.parametrize("steps", [5, 1], ids=["steps", "static"])
@torch.no_grad()
def test_a_layer_gives_the_packed_numbers_on_integer_kernels(
    kind: str, steps: int, simulate: Any, context: StepContext
) -> None:
    packed = around(pack_layer(simulate(seeded(kind), 4, 8, (7, 5), steps)), context)
    run, x = OpenVinoDenoiser(packed), input_for(kind)
    for timestep in TIMES:
        assert_agrees(run(x, timestep), packed(x, timestep), 2e-6)
        assert integers(run) == 2


@needs_openvino
@torch.no_grad()
def test_it_compiles_once_for_all_steps_and_again_for_other_shapes(
    simulate: Any, context: StepContext, caplog: Any
) -> None:
    run = OpenVinoDenoiser(around(pack_layer(simulate(seeded("linear"), 4)), context))
    caplog.set_level(logging.INFO)
    for timestep in (0, 10, torch.tensor(40)):
        run(input_for("linear"), timestep)
    assert len(caplog.records) == 1
    assert "compiled Denoiser for (3, 5, 12)" in caplog.text and "on OpenVINO's CPU" in caplog.text
    run(input_for("linear", 2), 0)
    assert len(caplog.records) == 2
    run(input_for("linear"), 20)
    assert len(caplog.records) == 2


@needs_openvino
@torch.no_grad()
def test_precision_is_asked_for_on_every_device(simulate: Any, context: StepContext) -> None:
    packed, x = around(pack_layer(simulate(seeded("linear"), 4)), context), input_for("linear")
    assert_agrees(OpenVinoDenoiser(packed, "AUTO")(x, 10), packed(x, 10), 2e-6)

    class Compiled:
        def get_property(self, name: str) -> Any:
            import openvino

            names = ["INFERENCE_PRECISION_HINT"]
            return names if name == "SUPPORTED_PROPERTIES" else openvino.Type.f16

    with pytest.raises(
        StepQuantError, match="CPU computes in f16 instead of the requested 'f32': exp"
    ):
        OpenVinoDenoiser(packed)._check_precision(Compiled())


@needs_openvino
@torch.no_grad()
def test_a_folder_keeps_compiled_models(simulate: Any, context: StepContext, tmp_path: Any) -> None:
    packed, x = around(pack_layer(simulate(seeded("linear"), 4)), context), input_for("linear")
    first = OpenVinoDenoiser(packed, cache=tmp_path)(x, 10)
    kept = sorted(tmp_path.iterdir())
    assert kept
    assert torch.equal(OpenVinoDenoiser(packed, cache=tmp_path)(x, 10), first)
    assert sorted(tmp_path.iterdir()) == kept


@pytest.fixture(scope="module")
def packed(tiny_pipeline: Any) -> Any:
    settings = {"calibration.trajectories": 1, "scheme.attention_bits": 8}
    return quantize(tiny_pipeline(), "training-free", 8, 8, steps=2, settings=settings).pipeline


@needs_openvino
@needs_vnni
def test_a_unet_with_a_bypass_and_integer_attention(packed: Any) -> None:
    with torch.no_grad():
        run = OpenVinoDenoiser(packed.unet)
        expected = denoiser_call(packed.unet, 2)()[0]
        found = denoiser_call(packed.unet, 2, runs=run)()
    assert isinstance(found, tuple) and len(found) == 1
    # A code at a tie may fall to the other side, and takes others along.
    assert (found[0] - expected).norm() / expected.norm() < 0.02
    parts = sum(len(m.splits) for m in packed.unet.modules() if isinstance(m, IntegerLayer))
    counts = run.kernels()
    assert sum(count for name, count in counts.items() if name.endswith("_I8")) == parts
    assert run.config is packed.unet.config and run.dtype == torch.float32
    assert inspect.signature(run.forward) == inspect.signature(packed.unet.forward)


@needs_openvino
@needs_vnni
def test_a_pipeline_samples_with_it_and_stays_as_it_was(packed: Any) -> None:
    other = with_backend(packed, "openvino")
    assert isinstance(other.unet, OpenVinoDenoiser)
    assert not isinstance(packed.unet, OpenVinoDenoiser)
    assert other.config == packed.config
    images, expected = sample_images(other, 2, 2), sample_images(packed, 2, 2)
    assert (images - expected).abs().mean() < 0.02
    assigned = copy.copy(packed)
    assigned.unet = OpenVinoDenoiser(packed.unet)
    assert torch.equal(sample_images(assigned, 2, 2), images)


@needs_openvino
@needs_vnni
@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
@torch.no_grad()
def test_every_architecture_runs_with_all_its_arguments(name: str) -> None:
    session = architectures.session(name)
    session.ensure_ranges()
    denoiser = pack_model(session.model).eval()
    adapter = adapter_for(denoiser)
    run = OpenVinoDenoiser(denoiser)
    expected = denoiser_call(denoiser, 2, adapter=adapter)()[0]
    found = denoiser_call(denoiser, 2, adapter=adapter, runs=run)()[0]
    assert (found - expected).norm() / expected.norm() < 0.05
    parts = sum(len(m.splits) for m in denoiser.modules() if isinstance(m, IntegerLayer))
    counts = run.kernels()
    assert sum(count for name, count in counts.items() if name.endswith("_I8")) == parts


def test_a_missing_package_says_how_to_install_it(
    simulate: Any, context: StepContext, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(StepQuantError, match=r'run `pip install "stepquant\[openvino\]"`$'):
        OpenVinoDenoiser(around(pack_layer(simulate(seeded("linear"), 4)), context))


@needs_openvino
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"device": "TPU"}, "OpenVINO has no device 'TPU' on this machine: expected one of AUTO, "),
        ({"precision": "int4"}, "precision of the backend openvino is 'int4': expected one of f32"),
    ],
    ids=str,
)
def test_bad_options_are_refused(
    changes: Any, told: str, simulate: Any, context: StepContext
) -> None:
    with pytest.raises(StepQuantError, match=told):
        OpenVinoDenoiser(around(pack_layer(simulate(seeded("linear"), 4)), context), **changes)


@needs_openvino
def test_bad_calls_are_refused(simulate: Any, context: StepContext) -> None:
    run, x = (
        OpenVinoDenoiser(around(pack_layer(simulate(seeded("linear"), 4)), context)),
        torch.ones(2, 12),
    )
    with pytest.raises(StepQuantError, match="was called without a timestep"):
        run(x, None)
    with pytest.raises(StepQuantError, match=r"with a tensor in torch.bfloat16 on cpu: expected f"):
        run(x.bfloat16(), 0)
    with pytest.raises(StepQuantError, match="argument 'more' holds a object: expected tensors"):
        run(x, 0, more=object())
    run(x, 0)
    attach_branch(
        run.denoiser.layer, "late", LoraBranch(torch.ones(1, 12), torch.ones(8, 1), 1.0, 1.0)
    )
    with pytest.raises(StepQuantError, match="'layer' has the LoRA 'late': expected none"):
        run(x, 0)


@needs_openvino
def test_what_openvino_does_not_know_is_named(simulate: Any, context: StepContext) -> None:
    class Odd(Denoiser):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return torch.frexp(self.layer(sample)).mantissa

    odd = Odd(pack_layer(simulate(seeded("linear"), 4)))
    context.attach(odd)
    with pytest.raises(StepQuantError, match="OpenVINO cannot compile Odd for its CPU") as error:
        OpenVinoDenoiser(odd)(input_for("linear"), 0)
    assert "aten::frexp" in str(error.value) and "\n" not in str(error.value)
