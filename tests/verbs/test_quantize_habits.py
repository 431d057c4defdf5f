"""Pipelines that call their denoiser unevenly, leave layers out, or have two denoisers."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInstructPix2PixPipeline,
)
from PIL import Image
from torch import nn

from architectures import ARCHITECTURES, WAN_CALL, build, condition_unet, wan, with_weights
from plain_denoiser import SHAPE, denoiser
from quantize_runs import FAST_MINMAX, refused, tree
from stepquant.api import load, quantize, sample
from stepquant.calibration.called_layers import REASON
from stepquant.calibration.survey import general_adapter
from stepquant.calibration.trajectories import capture_trajectories, predict
from stepquant.models.hooks import hooked
from stepquant.numerics import range_to_grid
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.denoiser_pipeline import DenoiserPipeline
from stepquant.runtime.layers.integer import IntegerLayer

STEPS = 5
FEW = {"calibration.trajectories": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(1000),
        PNDMScheduler(1000, skip_prk_steps=True),
        HeunDiscreteScheduler(1000),
    ],
    ids=["ddim", "pndm", "heun"],
)
def test_samplers_that_call_the_denoiser_unevenly_calibrate_every_step(scheduler):
    """A layer of few values gives fewer of them at a step with fewer calls."""
    pipeline = DenoiserPipeline(denoiser(), shape=SHAPE, scheduler=scheduler)
    settings = {"calibration.scheduler": None, "ranges.activations": "minmax", **FEW}
    result = quantize(pipeline, "minmax", 8, 8, steps=STEPS, settings=settings)
    inputs = capture_trajectories(pipeline, 2, STEPS, 1_000_000, None)
    seen = {}

    def look(name, args, kwargs):
        low, high = args[0].min().item(), args[0].max().item()
        before = seen.get(name, (0.0, 0.0))
        seen[name] = min(low, before[0]), max(high, before[1])

    layers = {n: m for n, m in pipeline.denoiser.named_modules() if isinstance(m, nn.Linear)}
    with torch.no_grad(), hooked(layers, before=look):
        predict(pipeline.denoiser, inputs)
    for name, extremes in seen.items():
        scale, zero_point = range_to_grid(*torch.tensor(extremes).view(2, 1), 8)
        packed = result.pipeline.denoiser.get_submodule(name)
        torch.testing.assert_close(packed.act_scale.flatten(), scale)
        assert int(packed.act_zero_point) == int(zero_point)


def stop_guidance(pipeline, index, timestep, kept):
    if index == 1:
        kept["prompt_embeds"] = kept["prompt_embeds"].chunk(2)[-1]
        pipeline._guidance_scale = 0.0
    return kept


def distances(recipe, call):
    """Number of inputs, and distance from the float model, at each step of its trajectories."""
    pipeline, arguments = build("sd"), {**ARCHITECTURES["sd"].arguments, "call": call}
    result = quantize(pipeline, recipe, 8, 8, steps=STEPS, settings=FEW, **arguments)
    conditioning = Conditioning.of(arguments["prompts"], None, None, call)
    inputs = capture_trajectories(pipeline, 2, STEPS, 1_000_000, "ddim", conditioning=conditioning)
    rows = [inputs.step(row) for row in range(STEPS)]
    with torch.no_grad():
        return [
            (len(row), distance(predict(result.pipeline.unet, row), predict(pipeline.unet, row)))
            for row in rows
        ]


@pytest.mark.parametrize("recipe", ["minmax", "training-free"])
def test_guidance_may_end_half_way(recipe):
    """Each step is as near the float model as with guidance to the end."""
    call = {
        "callback_on_step_end": stop_guidance,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    half, whole = distances(recipe, call), distances(recipe, {})
    assert [count for count, _ in half] == [4, 4, 2, 2, 2]
    for (_, found), (_, wanted) in zip(half, whole, strict=True):
        assert found < 1.5 * wanted


def fused():
    pipeline = build("sd")
    pipeline.fuse_qkv_projections()
    return pipeline, {}


def with_unused_projection():
    parts = dict(build("sd").components)
    parts["unet"] = with_weights(condition_unet(in_channels=8, time_cond_proj_dim=8))
    pipeline = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    return pipeline, {"image": Image.new("RGB", (16, 16))}


@pytest.mark.parametrize(
    ("make", "left"),
    [(fused, ("to_q", "to_k", "to_v")), (with_unused_projection, ("cond_proj",))],
    ids=["fused projections", "a projection that the pipeline does not use"],
)
def test_a_layer_that_is_never_called_stays_float_and_is_listed(make, left):
    pipeline, call = make()
    arguments = {**ARCHITECTURES["sd"].arguments, "call": call}
    result = quantize(pipeline, "minmax", 8, 8, steps=2, settings=FAST_MINMAX, **arguments)
    listed = result.record["left_float"]
    assert listed and set(listed.values()) == {REASON}
    assert {name.rpartition(".")[2] for name in listed} == set(left)
    for name, module in result.pipeline.unet.named_modules():
        assert not (name in listed and isinstance(module, IntegerLayer))
    assert result.pipeline.unet.config.quantization_config.float_layers == listed


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "float"
    wan().save_pretrained(folder)
    return folder


def integer_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, IntegerLayer)]


def test_a_second_denoiser_that_stays_float_is_named(tmp_path):
    pipeline = wan()
    conditions = {"prompts": ["a cat", "b"], "call": WAN_CALL}
    adapter = general_adapter(pipeline, **conditions)
    arguments = {"adapter": adapter, "settings": FAST_MINMAX, "steps": 4, **conditions}
    with pytest.warns(UserWarning, match="'transformer_2' of WanPipeline stays float"):
        result = quantize(pipeline, "minmax", 8, 8, out=tmp_path / "out", **arguments)
    assert result.record["denoisers_float"] == ["transformer_2"]
    assert integer_layers(result.pipeline.transformer)
    # What its class keeps in float32 is float, and the folder draws.
    assert not [
        name for name in integer_layers(result.pipeline.transformer) if "time_embed" in name
    ]
    loaded = load(tmp_path / "out")
    loaded.set_progress_bar_config(disable=True)
    assert loaded("a cat", num_inference_steps=4, **WAN_CALL).frames[0].shape[0] == 5


def test_weight_only_quantizes_both_denoisers(wan_folder, tmp_path):
    record = quantize(wan_folder, "weight-only", out=tmp_path / "out").record
    assert set(record["components"]) == {"transformer", "transformer_2"}
    one, other = (record["components"][name]["layers"] for name in record["components"])
    assert one == other > 0


class Fussy(nn.Module):
    """Reads a tensor that quantized layers do not have."""

    def __init__(self):
        super().__init__()
        self.inner = denoiser()

    def forward(self, x, timestep):
        stem = self.inner.stem
        return self.inner(x, timestep) * (stem.weight.mean() if stem.weight is not None else 1)


def test_a_packed_denoiser_that_cannot_be_called_is_not_written(tmp_path):
    pipeline = DenoiserPipeline(Fussy().eval(), shape=SHAPE, scheduler=DDIMScheduler(1000))
    told = refused(
        lambda: quantize(pipeline, "minmax", out=tmp_path / "out", steps=2, settings=FAST_MINMAX)
    )
    assert "the quantized denoiser of 'DenoiserPipeline' cannot be called" in told
    assert "'IntegerConv2d' object has no attribute 'weight'" in told
    assert not (tmp_path / "out").exists()


def compiled(pipeline, way):
    if way == "torch.compile":
        pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    elif way == "in place":
        pipeline.unet.compile(backend="eager")
    return pipeline


@pytest.mark.parametrize("way", ["torch.compile", "in place"])
def test_a_compiled_denoiser_is_quantized_as_it_was_before(way, tmp_path):
    """Its layers are looked at and changed, for which nothing need be compiled."""
    arguments = {"steps": 2, "settings": FAST_MINMAX, **ARCHITECTURES["sd"].arguments}
    pipeline = compiled(build("sd"), way)
    before = pipeline.unet
    quantize(pipeline, "minmax", 8, 8, out=tmp_path / "out", **arguments)
    quantize(build("sd"), "minmax", 8, 8, out=tmp_path / "plain", **arguments)
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")
    assert pipeline.unet is before  # the caller's stays compiled
    kept = getattr(before, "_orig_mod", before)
    assert (kept._compiled_call_impl is not None) == (way == "in place")


def test_own_is_the_scheduler_of_the_pipeline(tmp_path):
    arguments = {"steps": 2, **ARCHITECTURES["sd"].arguments}
    for name in ("own", None):
        settings = {**FAST_MINMAX, "calibration.scheduler": name}
        quantize(build("sd"), "minmax", out=tmp_path / str(name), settings=settings, **arguments)
    assert tree(tmp_path / "own") == tree(tmp_path / "None")
    images = [sample(build("sd"), 1, scheduler=name, **arguments) for name in ("own", None)]
    assert torch.equal(*images)
    told = refused(lambda: sample(build("sd"), 1, scheduler="odd", **arguments))
    assert "unknown scheduler 'odd': expected one of auto, own, ddim" in told
