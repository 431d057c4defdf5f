"""What `quantize` refuses, and that nothing of a refused job is left."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

from quantize_runs import FAST_MINMAX, SMALL, left, refused, tree
from stepquant.methods.recipe import parse_recipe
from stepquant.models.unet2d import UNet2DAdapter
from stepquant.verbs.quantize import quantize
from stepquant.verbs.readiness import check_denoiser

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def float_pipeline(tiny_pipeline):
    return tiny_pipeline()


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
    assert "has the dtype torch.bfloat16: expected torch.float32" in sentence
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("layer", "has"),
    [
        (nn.Dropout2d(0.1), "dropout"),
        (nn.AlphaDropout(0.1), "dropout"),
        (nn.BatchNorm2d(1), "batch norms"),
        (nn.SyncBatchNorm(1), "batch norms"),
    ],
    ids=["dropout2d", "alpha dropout", "batch norm", "synchronized batch norm"],
)
def test_layers_that_are_other_in_training_are_refused_in_training_mode(tiny_unet, layer, has):
    unet = tiny_unet(**SMALL)
    unet.extra = layer
    check_denoiser(unet.eval(), "unet")
    unet.train()
    assert f"the unet is in training mode and has {has}" in refused(
        lambda: check_denoiser(unet, "unet")
    )


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
    assert sentence.startswith("no adapter for the architecture Denoiser: expected one of DiT")


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


@pytest.mark.parametrize(("recipe", "bits"), [("mpq-dm", 1), ("mpq-dm-plus", 1), ("mpq-dm", 8)])
def test_bits_without_room_for_mixing_leave_nothing(float_pipeline, tmp_path, recipe, bits):
    act = lambda: quantize(float_pipeline, recipe, bits, 4, tmp_path / "out", 2)  # noqa: E731
    sentence = f"step 'outlier_mixed_bits' got {bits} weight bits: expected 2 to 7"
    assert refused(act).startswith(sentence)
    assert left(tmp_path) == []


def test_features_without_pixels_are_refused_before_anything_is_sampled(
    float_pipeline, tmp_path, monkeypatch
):
    monkeypatch.setattr(UNet2DAdapter, "relation_site", lambda *_: "time_embedding")
    monkeypatch.setattr("stepquant.verbs.calibration_inputs.capture_trajectories", None)
    act = lambda: quantize(float_pipeline, "mpq-dm", 2, 4, tmp_path / "out", 2)  # noqa: E731
    sentence = "step 'relation_distillation' found (1, 64) at 'time_embedding': expected features"
    assert refused(act).startswith(sentence)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "step",
    [
        {"bit_allocation": {}},
        {"trajectory_distillation": {"influence_exponent": 0.5}},
        {"relation_distillation": {"influence_exponent": 1.0}},
    ],
    ids=lambda step: next(iter(step)),
)
def test_a_sampler_with_a_memory_is_refused_before_anything_is_sampled(
    float_pipeline, tmp_path, monkeypatch, step
):
    class Sampled(Exception):
        pass

    def capture(*_, **__):
        raise Sampled

    monkeypatch.setattr("stepquant.verbs.calibration_inputs.capture_trajectories", capture)
    recipe = {"name": "x", "description": "", "calibration": {"scheduler": "dpm-solver++"}}
    act = lambda step=step: quantize(  # noqa: E731
        float_pipeline, parse_recipe({**recipe, "steps": [step]}, "x"), 2, 4, tmp_path / "out", 2
    )
    assert "only, not through DPMSolverMultistepScheduler" in refused(act)
    assert left(tmp_path) == []
    ((name, _),) = step.items()
    without = {"errors_of": "prediction"} if name == "bit_allocation" else {}
    with pytest.raises(Sampled):
        act({name: without})
