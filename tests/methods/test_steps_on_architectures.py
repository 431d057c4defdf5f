"""What steps that no shipped recipe has do, or say, on other architectures than `UNet2DModel`."""

from __future__ import annotations

import copy

import pytest
import torch

from architectures import ARCHITECTURES, session
from quantize_runs import Lines, refused
from stepquant.calibration.trajectories import predict
from stepquant.engines.backend import set_backend
from stepquant.methods.adaptive_softmax import AdaptiveSoftmax
from stepquant.methods.bias_correction import BiasCorrection
from stepquant.methods.bit_allocation import BitAllocation
from stepquant.methods.block_distillation import BlockDistillation
from stepquant.methods.block_reconstruction import BlockReconstruction
from stepquant.methods.channel_reparameterization import ChannelReparameterization
from stepquant.methods.input_error_bypass import InputErrorBypass
from stepquant.methods.temporal_quantizer import TemporalQuantizer
from stepquant.methods.training.guarded_block import GuardedBlock
from stepquant.models.input_bypass import common_channels, detach_bypass
from stepquant.simulation.packing import pack_model


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bias_correction_takes_the_mean_error_off(name):
    """Of Flux the channels of tokens, which come last; of others patches are put together last."""
    corrected = session(name, 3, 4)
    corrected.ensure_ranges()
    before = errors(corrected)
    BiasCorrection(samples_per_step=8).apply(corrected)
    after = errors(corrected)
    assert float(after.abs().max()) < 0.3 * float(before.abs().max())
    data = corrected.trajectories
    expected = predict(corrected.model, data)
    packed = pack_model(corrected.model)
    set_backend(packed, "reference")
    assert torch.equal(predict(packed, data), expected)


def errors(current):
    """Mean error of each channel at each step, `[T, C]`."""
    rows = []
    for row in range(3):
        inputs = current.trajectories.step(row)
        error = predict(current.model, inputs) - predict(current.float_model, inputs)
        channels = error.flatten(2).mean(dim=(0, 2)) if error.dim() == 4 else error.mean(dim=(0, 1))
        rows.append(channels)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("name", "weights"),
    [("sd", [-6.5, 7.5]), ("dit", [4.0, -3.0]), ("pixart", [-3.5, 4.5])],
    ids=["sd", "dit", "pixart"],
)
def test_the_influence_of_a_step_is_followed_through_the_mix_of_guidance_only(name, weights):
    """The weights are those of the pipelines' own scales, in the order of their calls."""
    guided = session(name)
    guided.scheduler.set_timesteps(3)
    assert guided.mixing.tolist() == pytest.approx(weights, rel=1e-3)
    assert guided.image_gradients().shape[:2] == (3, 2)
    unknown = session(name)
    unknown.mixing = None
    assert "expected no classifier-free guidance" in refused(unknown.image_gradients)


@pytest.mark.parametrize("name", ["sd", "dit", "flux"])
def test_bits_are_allocated_by_the_error_of_the_prediction(name):
    allocated = session(name, 4, 8)
    TemporalQuantizer().apply(allocated)
    BitAllocation(errors_of="prediction", samples=4).apply(allocated)
    summary = allocated.summary["bit_allocation"]
    for rows in (summary["weights"], summary["activations"]):
        assert sum(row["error"] for row in rows) <= sum(row["uniform_error"] for row in rows)
    with torch.no_grad():
        assert bool(predict(allocated.model, allocated.trajectories).isfinite().all())


@pytest.mark.parametrize(
    "step",
    [
        BlockDistillation(iterations=2, batch=4, samples=16),
        BlockReconstruction(iterations=2, batch=4, samples=16, penalty=0.0),
    ],
    ids=lambda step: step.name,
)
@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_time_embeddings_are_trained_only_where_they_are_blocks_of_their_own(
    name, step, monkeypatch
):
    """A DiT's lie in its blocks, PixArt's stands alone. The last state is kept, better or not."""
    monkeypatch.setattr(GuardedBlock, "restore", lambda self: None)
    trained = session(name, 4, 4)
    trained.ensure_ranges()
    before = {key: value.clone() for key, value in trained.model.state_dict().items()}
    step.apply(trained)
    embedding = trained.adapter.time_embedding_layers(trained.float_model)
    moved = {
        layer
        for layer in trained.layers()
        if not torch.equal(trained.model.state_dict()[f"{layer}.weight"], before[f"{layer}.weight"])
    }
    in_blocks = {layer for layer in embedding if layer.startswith("transformer_blocks.")}
    assert in_blocks == (embedding if name == "dit" else set())
    assert not in_blocks & moved
    for layer in in_blocks:
        for key, value in trained.model.get_submodule(layer).state_dict().items():
            assert torch.equal(value, before[f"{layer}.{key}"]), (layer, key)
    blocks = trained.adapter.blocks(trained.float_model)
    expected = set(trained.layers()) - in_blocks
    assert moved == {
        name for name in expected if any(f"{name}.".startswith(f"{b}.") for b in blocks)
    }


def test_steps_that_find_nothing_to_do_say_so():
    empty = session("flux")
    empty.reporter = Lines()
    ChannelReparameterization().apply(empty)
    AdaptiveSoftmax().apply(empty)
    assert "the model has no convolutions" in empty.reporter.lines[0]
    assert "the model has no quantized attention" in empty.reporter.lines[1]
    assert empty.summary["channel_reparameterization"] == []


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_the_input_layer_loses_passes_by_every_architecture(name):
    current = session(name, 8, 8)
    InputErrorBypass(samples_per_step=8).apply(current)
    slopes = current.summary["input_error_bypass"]["slopes"]
    layer = current.layers()[current.summary["input_error_bypass"]["layer"]]
    data = current.trajectories.step(1)
    found = predict(current.model, data)
    packed = pack_model(copy.deepcopy(current.model))
    set_backend(packed, "reference")
    assert torch.equal(predict(packed, data), found)
    detach_bypass(current.model)
    sample, first = common_channels(layer.input_error(data.sample), found)
    without = predict(current.model, data)[:, : first.shape[1]]
    torch.testing.assert_close(first, without + slopes[1] * sample, rtol=1e-4, atol=1e-5)
