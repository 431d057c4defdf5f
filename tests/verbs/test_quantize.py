from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from quantize_runs import FAST, SMALL, TINY, Lines, left, tree
from stepquant.calibration.observe import quant_layers
from stepquant.pipelines.opening import open_pipeline
from stepquant.pipelines.sampling import sample_images
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.support.errors import StepQuantError
from stepquant.verbs.quantize import quantize

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def float_pipeline(tiny_pipeline):
    return tiny_pipeline()


MINMAX = {"ranges.weights": "minmax", "ranges.activations": "minmax"}
ADAPTERS = {"calibration.trajectories": 2, "low_rank_adapters.rank": 2}
EFFICIENTDM = {
    **ADAPTERS,
    "trajectory_distillation.rounds": 1,
    "trajectory_distillation.batch": 2,
}
MPQ_DM = {
    **ADAPTERS,
    **MINMAX,
    "outlier_mixed_bits.samples": 4,
    "relation_distillation.rounds": 1,
    "relation_distillation.batch": 2,
}
RUNS = {
    "minmax w8a8": ("minmax", 8, 8, {"calibration.trajectories": 2}),
    "minmax w3a5": ("minmax", 3, 5, {"calibration.trajectories": 2}),
    "dilatequant w4a8": ("dilatequant", 4, 8, TINY),
    "dilatequant w4a4": ("dilatequant", 4, 4, FAST),
    "efficientdm w2a4": ("efficientdm", 2, 4, EFFICIENTDM),  # searched: levels around zero too
    "mpq-dm w2a4": ("mpq-dm", 2, 4, {**MPQ_DM, "outlier_mixed_bits.selection": "error"}),
    "mpq-dm-plus w2a4": ("mpq-dm-plus", 2, 4, MPQ_DM),
    "mpq-dm w2a4 of the paper": ("mpq-dm", 2, 4, {**MPQ_DM, "scheme.protocol": "paper:mpq-dm"}),
}
EIGHT_BITS = {
    "strict": {"conv_in", "conv_out"},
    "paper:mpq-dm": {
        "conv_in",
        "conv_out",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
    },
}


@pytest.fixture(scope="module", params=RUNS.values(), ids=RUNS.keys())
def done(request, float_pipeline, tmp_path_factory):
    """A quantization, and the folder that it wrote."""
    recipe, weights, activations, settings = request.param
    out = tmp_path_factory.mktemp("runs") / "out"
    result = quantize(float_pipeline, recipe, weights, activations, out, 4, settings, seed=5)
    return result, out


def test_the_checkpoint_is_what_is_in_memory(done):
    result, out = done
    images = sample_images(result.pipeline, 3, 4, seed=1)
    assert torch.equal(sample_images(open_pipeline(out), 3, 4, seed=1), images)
    assert images.std() > 0.05
    assert left(out.parent) == ["out"]


def test_every_layer_is_packed_at_its_bits(done):
    result, _ = done
    modules, record = dict(result.pipeline.unet.named_modules()), result.record
    packed = {name: m for name, m in modules.items() if isinstance(m, IntegerLayer)}
    plain = {name for name, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert plain == record["left_float"].keys()
    assert len(plain) == (0 if record["protocol"] == "strict" else 5)
    assert len(packed) + len(plain) == 50
    weights, activations = (int(bits) for bits in record["bits"][1:].split("a"))
    mixed = record["recipe"]["name"].startswith("mpq-dm")
    extra = record["recipe"]["name"] == "mpq-dm-plus"
    for name, layer in packed.items():
        spec, outer = layer.spec, name in EIGHT_BITS[record["protocol"]]
        assert spec.activation_bits == (8 if outer else activations), name
        if outer or not mixed:
            assert (spec.channel_counts, spec.weight_bits) == (None, 8 if outer else weights), name
        else:
            paid = spec.out_channels // 10 / spec.out_channels if extra else 0
            assert spec.mean_weight_bits == pytest.approx(weights + paid), name
            assert spec.weight_bits in (weights, weights + 1), name
        assert layer.steps == (4 if record["recipe"]["steps"] else 1)
    widths = {layer.spec.channel_counts for layer in packed.values()} - {None}
    assert bool(widths) == mixed
    halves = any(layer.spec.half_zero_points for layer in packed.values())
    assert halves == (weights <= 3 and record["recipe"]["ranges"]["weights"] == "mse")


@torch.no_grad()
def test_each_packed_layer_gives_what_its_simulation_does_on_the_same_input(done):
    result, _ = done
    packed, differences = result.pipeline.unet, {}

    def compare(name, args, output):
        theirs = packed.get_submodule(name)(args[0])
        difference = float((theirs - output).abs().max() / output.abs().max())
        differences[name] = max(differences.get(name, 0.0), difference)

    handles = [
        layer.register_forward_hook(lambda _m, args, y, name=name: compare(name, args, y))
        for name, layer in quant_layers(result.simulation).items()
    ]
    context = next(m.context for m in packed.modules() if isinstance(m, IntegerLayer))
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for timestep in (torch.tensor(750), torch.tensor(0), torch.tensor([250, 500])):
        context.set_timestep(timestep)
        result.simulation(x, timestep)
    for handle in handles:
        handle.remove()
    assert len(differences) == 50 - len(result.record["left_float"])
    assert max(differences.values()) <= 1e-3, max(differences.items(), key=lambda item: item[1])


def test_the_record_is_finite_json_and_embedded_in_the_checkpoint(done):
    result, out = done
    record = result.record
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert {"seconds", "peak_memory_mb", "protocol", "reference_layers", "summary"} <= set(record)
    assert record["provenance"]["seed"] == 5
    assert record["provenance"]["threads"] == 1
    assert "4 steps" in record["provenance"]["sampler"]
    assert len(record["attention_float"]) == 4
    names = [name for step in record["recipe"]["steps"] for name in step]
    assert list(record["summary"]) == names
    stored = json.loads((out / "unet" / "config.json").read_text())["quantization_config"]
    assert stored["recipe"] == record["recipe"]
    assert stored["provenance"] == record["provenance"]


def test_the_checkpoint_is_smaller_by_what_the_record_says(done):
    result, out = done
    record = result.record
    weights = out / "unet" / "diffusion_pytorch_model.safetensors"
    assert record["checkpoint_bytes"] == weights.stat().st_size
    assert record["times_smaller"] == record["float32_bytes"] / record["checkpoint_bytes"]
    layers = [m for m in result.pipeline.unet.modules() if isinstance(m, IntegerLayer)]
    counts = [layer.spec.columns * layer.spec.out_channels for layer in layers]
    bits = sum(layer.spec.mean_weight_bits * n for layer, n in zip(layers, counts, strict=True))
    assert record["mean_weight_bits"] == pytest.approx(bits / sum(counts))
    if record["protocol"] == "strict":  # few weights have eight bits
        assert record["mean_weight_bits"] == pytest.approx(int(record["bits"][1]), rel=0.15)


def test_the_float_pipeline_is_left_alone(done, float_pipeline, tiny_unet):
    result, _ = done
    assert result.pipeline is not float_pipeline
    assert type(float_pipeline.scheduler) is type(result.pipeline.scheduler) is DDPMScheduler
    assert not any(isinstance(m, IntegerLayer) for m in float_pipeline.unet.modules())
    for name, value in tiny_unet().state_dict().items():
        assert torch.equal(float_pipeline.unet.state_dict()[name], value), name
    assert not float_pipeline.unet._forward_pre_hooks


def test_eight_bits_are_nearer_the_float_model_than_three(float_pipeline):
    settings = {"calibration.trajectories": 4}
    float_images = sample_images(float_pipeline, 4, 4, seed=1)
    errors = []
    for bits in (8, 3):
        result = quantize(float_pipeline, "minmax", bits, bits, steps=4, settings=settings)
        images = sample_images(result.pipeline, 4, 4, seed=1)
        errors.append((images - float_images).abs().mean().item())
        assert "checkpoint_bytes" not in result.record
    assert errors[0] < errors[1] / 4


def test_the_seed_decides_everything(tiny_pipeline, tmp_path):
    pipeline = tiny_pipeline(**SMALL)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))
        quantize(pipeline, "dilatequant", 4, 4, tmp_path / name, 2, FAST, seed=seed)
    a, b, c = (tree(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert a != c


def test_layers_that_stay_float_are_announced_and_kept(tiny_pipeline, tmp_path):
    pipeline, reporter = tiny_pipeline(**SMALL), Lines()
    block = pipeline.unet.mid_block.resnets[0]
    channels = block.conv1.in_channels
    block.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
    result = quantize(pipeline, "dilatequant", 4, 8, steps=2, settings=FAST, reporter=reporter)
    name = "mid_block.resnets.0.conv1"
    assert result.record["left_float"] == {name: "grouped conv (2 groups)"}
    assert reporter.lines[-1] == f"layer '{name}' stays float: grouped conv (2 groups)"
    kept = result.pipeline.unet.get_submodule(name)
    assert torch.equal(kept.weight, block.conv1.weight)


def test_a_convolution_that_no_load_could_rewrite_is_refused_before_the_work(
    tiny_pipeline, tmp_path
):
    pipeline = tiny_pipeline(**SMALL)
    conv = pipeline.unet.mid_block.resnets[0].conv1
    conv.padding_mode = "circular"
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    with pytest.raises(StepQuantError, match=r"'mid_block\.resnets\.0\.conv1' of UNet2DModel has"):
        quantize(pipeline, "minmax", 8, 8, tmp_path / "out", 2)
    assert not (tmp_path / "out.work").exists()
