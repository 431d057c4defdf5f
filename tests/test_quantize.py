from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

from quantize_runs import FAST, FAST_MINMAX, SMALL, TINY, left, refused, tree
from stepquant.calibration.observe import quant_layers
from stepquant.progress import Reporter
from stepquant.quantize import quantize
from stepquant.runtime.packed import PackedLayer
from stepquant.sampling import sample_images
from stepquant.sources import open_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

# End to end.


@pytest.fixture(scope="module")
def float_pipeline(tiny_pipeline):
    return tiny_pipeline()


RUNS = {
    "minmax w8a8": ("minmax", 8, 8, {"calibration.trajectories": 2}),
    "minmax w3a5": ("minmax", 3, 5, {"calibration.trajectories": 2}),
    "dilatequant w4a8": ("dilatequant", 4, 8, TINY),
    "dilatequant w4a4": ("dilatequant", 4, 4, FAST),
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
    packed = {n: m for n, m in result.pipeline.unet.named_modules() if isinstance(m, PackedLayer)}
    assert len(packed) == 50
    assert not any(isinstance(m, nn.Linear | nn.Conv2d) for m in result.pipeline.unet.modules())
    weights, activations = (int(bits) for bits in result.record["bits"][1:].split("a"))
    for name, layer in packed.items():
        expected = (8, 8) if name in ("conv_in", "conv_out") else (weights, activations)
        assert (layer.spec.weight_bits, layer.spec.activation_bits) == expected, name
        assert layer.steps == (4 if result.record["recipe"]["steps"] else 1)


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
    context = next(m.context for m in packed.modules() if isinstance(m, PackedLayer))
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for timestep in (torch.tensor(750), torch.tensor(0), torch.tensor([250, 500])):
        context.set_timestep(timestep)
        result.simulation(x, timestep)
    for handle in handles:
        handle.remove()
    assert len(differences) == 50
    assert max(differences.values()) <= 1e-3, max(differences.items(), key=lambda item: item[1])


def test_the_record_is_finite_json_and_embedded_in_the_checkpoint(done):
    result, out = done
    record = result.record
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert {"seconds", "peak_memory_mb", "protocol", "reference_layers", "summary"} <= set(record)
    assert record["provenance"]["seed"] == 5
    assert record["provenance"]["threads"] == 1
    assert "4 steps" in record["provenance"]["sampler"]
    assert record["left_float"] == {}
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
    layers = [m for m in result.pipeline.unet.modules() if isinstance(m, PackedLayer)]
    counts = [layer.spec.columns * layer.spec.out_channels for layer in layers]
    bits = sum(layer.spec.weight_bits * n for layer, n in zip(layers, counts, strict=True))
    assert record["mean_weight_bits"] == pytest.approx(bits / sum(counts))
    assert record["mean_weight_bits"] == pytest.approx(int(record["bits"][1]), rel=0.15)


def test_the_float_pipeline_is_left_alone(done, float_pipeline, tiny_unet):
    result, _ = done
    assert result.pipeline is not float_pipeline
    assert type(float_pipeline.scheduler) is type(result.pipeline.scheduler) is DDPMScheduler
    assert not any(isinstance(m, PackedLayer) for m in float_pipeline.unet.modules())
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


# What is refused.


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recipe": "none"}, "unknown recipe 'none'"),
        ({"weights": 9}, "bits of the scheme is 9"),
        ({"activations": 0}, "bits of the scheme is 0"),
        (
            {"settings": {"block_distillation.batch": 2}},
            "has no setting 'block_distillation.batch'",
        ),
        ({"settings": {"calibration.trajectories": 0}}, "'calibration.trajectories' is 0"),
        ({"settings": {"calibration.scheduler": "heun"}}, "unknown scheduler 'heun'"),
        ({"settings": {"calibration.scheduler": "euler"}}, "scales the denoiser's input"),
        ({"steps": 2000}, "number of sampling steps is 2000"),
        (
            {
                "settings": {
                    "scheme.overrides": [
                        {"pattern": "encoder.*", "weight_bits": 4, "activation_bits": 4}
                    ]
                }
            },
            "override pattern 'encoder.*' matches no layer",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_settings_are_told_and_nothing_is_left(float_pipeline, tmp_path, changes, told):
    options = {"recipe": "minmax", "steps": 2, "out": tmp_path / "out", **changes}
    assert told in refused(lambda: quantize(float_pipeline, **options))
    assert left(tmp_path) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tiny_pipeline, tmp_path, bad):
    pipeline = tiny_pipeline(**SMALL)
    pipeline.unet.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 0] = bad
    sentence = refused(lambda: quantize(pipeline, "minmax", out=tmp_path / "out", steps=2))
    assert sentence.startswith("parameter 'mid_block.resnets.0.conv1.weight' holds NaN or infinity")
    assert left(tmp_path) == []


def test_activations_that_overflow_name_layer_and_timestep(tiny_pipeline):
    pipeline = tiny_pipeline(**SMALL)
    pipeline.unet.mid_block.resnets[0].conv1.weight.data.mul_(1e38)
    sentence = refused(lambda: quantize(pipeline, "minmax", steps=2, settings=FAST_MINMAX))
    assert "the input of layer 'mid_block.resnets.0.conv2' holds NaN or infinity at" in sentence


def test_a_quantized_model_is_refused(tiny_pipeline, tmp_path):
    once = quantize(tiny_pipeline(**SMALL), "minmax", 4, 8, steps=2, settings=FAST_MINMAX)
    sentence = refused(lambda: quantize(once.pipeline, "minmax", out=tmp_path / "out", steps=2))
    assert "is quantized already: expected a float model" in sentence
    assert left(tmp_path) == []


@pytest.mark.parametrize("resume", [False, True])
def test_an_output_that_exists_is_refused_and_left_alone(tiny_pipeline, tmp_path, resume):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("dear")
    act = lambda: quantize(tiny_pipeline(), "minmax", out=out, steps=2, resume=resume)  # noqa: E731
    assert refused(act).startswith(f"output folder '{out}' exists: expected a new one")
    assert left(tmp_path) == ["out"]
    assert tree(out) == {"thesis.tex": b"dear"}


def test_half_precision_is_refused(tiny_pipeline, tmp_path):
    pipeline = tiny_pipeline(**SMALL)
    pipeline.unet.to(torch.bfloat16)
    sentence = refused(lambda: quantize(pipeline, "minmax", out=tmp_path / "out", steps=2))
    assert "holds torch.bfloat16: expected torch.float32" in sentence
    assert left(tmp_path) == []


def test_a_model_that_drops_out_is_refused_until_it_is_set_to_evaluate(tiny_pipeline):
    pipeline = tiny_pipeline(dropout=0.1, **SMALL)
    pipeline.unet.train()
    sentence = refused(lambda: quantize(pipeline, "minmax", steps=2, settings=FAST_MINMAX))
    assert "is in training mode and has dropout" in sentence
    pipeline.unet.eval()
    assert quantize(pipeline, "minmax", steps=2, settings=FAST_MINMAX).record["bits"] == "w8a8"


class WithoutTimestep(UNet2DModel):
    def forward(self, sample, sigma):
        return super().forward(sample, sigma)


class Denoiser(nn.Module):
    """Takes a timestep, but is of no known architecture."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, sample, timestep):
        return self.conv(sample)


def test_a_denoiser_without_a_timestep_is_refused(tiny_unet):
    unet = tiny_unet(**SMALL)
    unet.__class__ = WithoutTimestep
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    sentence = refused(lambda: quantize(pipeline, "minmax", steps=2))
    assert "forward has the arguments (sample, sigma): expected one called 'timestep'" in sentence


def test_an_unknown_architecture_is_refused(tiny_pipeline):
    pipeline = tiny_pipeline(**SMALL)
    pipeline.unet = Denoiser()
    sentence = refused(lambda: quantize(pipeline, "minmax", steps=2))
    assert sentence.startswith("no adapter for the architecture Denoiser: expected one of UNet2D")


def test_layers_that_stay_float_are_announced_and_kept(tiny_pipeline, tmp_path):
    class Lines(Reporter):
        def __init__(self):
            super().__init__(quiet=True)
            self.lines = []

        def line(self, text):
            self.lines.append(text)

    pipeline, reporter = tiny_pipeline(**SMALL), Lines()
    conv = pipeline.unet.mid_block.resnets[0].conv1
    conv.padding_mode = "circular"
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    result = quantize(pipeline, "dilatequant", 4, 8, steps=2, settings=FAST, reporter=reporter)
    name = "mid_block.resnets.0.conv1"
    assert result.record["left_float"] == {name: "padding (1, 1) of mode 'circular'"}
    assert reporter.lines[-1] == f"layer '{name}' stays float: padding (1, 1) of mode 'circular'"
    kept = result.pipeline.unet.get_submodule(name)
    assert torch.equal(kept.weight, conv.weight)


@pytest.mark.parametrize("seed", [-1, 10**30])
def test_a_seed_out_of_bounds_is_refused_before_anything_is_kept(float_pipeline, tmp_path, seed):
    sentence = refused(lambda: quantize(float_pipeline, "minmax", out=tmp_path / "out", seed=seed))
    assert sentence.startswith(f"seed is {seed}: expected 0 to ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["", ".", ".."])
def test_an_output_without_a_name_is_refused(float_pipeline, out):
    sentence = refused(lambda: quantize(float_pipeline, "minmax", out=out))
    assert "expected the name of a new folder" in sentence


def test_a_denoiser_without_its_pipeline_is_refused(tiny_unet):
    assert "the model is a UNet2DModel: expected" in refused(lambda: quantize(tiny_unet()))
    assert "the model is a NoneType: expected" in refused(lambda: quantize(None))
