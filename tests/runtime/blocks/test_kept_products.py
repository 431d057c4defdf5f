"""Switches of diffusers that replace attention processors, on quantized attention products."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)

from architectures import ARCHITECTURES, build
from quantize_runs import refused
from stepquant.api import load, quantize
from stepquant.models.attention_processor import ProductsProcessor
from stepquant.models.calling import call_denoiser

FEW = {"calibration.trajectories": 2, "ranges.weights": "minmax", "ranges.activations": "minmax"}

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def _quantized(bits: int | None) -> DiffusionPipeline:
    settings = {**FEW, "scheme.attention_bits": bits}
    arguments = ARCHITECTURES["sd"].arguments
    return quantize(build("sd"), "minmax", 8, 8, None, 2, settings, **arguments).pipeline


@pytest.fixture
def pipeline():
    return copy.deepcopy(_quantized(8))


@torch.no_grad()
def prediction(pipeline):
    generator = torch.Generator().manual_seed(2)
    x, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 8, 16)))
    return call_denoiser(pipeline.unet, x, torch.tensor(501), {"encoder_hidden_states": text})


def processors(pipeline):
    return {type(each) for each in pipeline.unet.attn_processors.values()}


SWITCHES = {
    "slicing on": lambda p: p.enable_attention_slicing(),
    "slicing off": lambda p: p.disable_attention_slicing(),
    "slices of one": lambda p: p.enable_attention_slicing(1),
    "the plain one": lambda p: p.unet.set_attn_processor(AttnProcessor()),
    "scaled dot products": lambda p: p.unet.set_attn_processor(AttnProcessor2_0()),
    "one for each": lambda p: p.unet.set_attn_processor(
        {name: SlicedAttnProcessor(1) for name in p.unet.attn_processors}
    ),
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
def test_other_forms_of_plain_attention_leave_the_products_quantized(pipeline, tmp_path, switch):
    before = prediction(pipeline)
    with pytest.warns(UserWarning, match="products are quantized, and stay so"):
        switch(pipeline)
    assert processors(pipeline) == {ProductsProcessor}
    assert torch.equal(prediction(pipeline), before)
    pipeline.save_pretrained(tmp_path / "again")
    assert torch.equal(prediction(load(tmp_path / "again")), before)


def test_its_own_processors_may_be_set_again(pipeline, recwarn):
    before = prediction(pipeline)
    pipeline.unet.set_attn_processor(pipeline.unet.attn_processors)
    assert torch.equal(prediction(pipeline), before)
    assert not [each for each in recwarn if "products" in str(each.message)]


@pytest.mark.parametrize("make", [AttnAddedKVProcessor2_0, FusedAttnProcessor2_0])
def test_a_processor_that_computes_something_else_is_refused(pipeline, make):
    before = prediction(pipeline)
    told = refused(lambda: pipeline.unet.set_attn_processor(make()))
    assert f"got the processor {make.__name__}: expected none" in told
    assert torch.equal(prediction(pipeline), before)
    # As diffusers does it for an IP-Adapter: another one of the same class.
    told = refused(lambda: type(next(iter(pipeline.unet.attn_processors.values())))())
    assert "got another processor" in told


def test_float_products_take_every_processor():
    """Numbers as before: only the order of operations differs."""
    pipeline = copy.deepcopy(_quantized(None))
    before = prediction(pipeline)
    pipeline.enable_attention_slicing()
    assert processors(pipeline) == {SlicedAttnProcessor}
    torch.testing.assert_close(prediction(pipeline), before, rtol=0, atol=0.02)


def test_dequantize_lets_go_of_the_products(pipeline, tmp_path):
    pipeline.unet.dequantize()
    assert processors(pipeline) == {AttnProcessor2_0}
    pipeline.save_pretrained(tmp_path / "float")
    assert torch.equal(prediction(load(tmp_path / "float")), prediction(pipeline))


def test_a_save_refuses_what_a_load_would(pipeline, tmp_path):
    """Whatever has taken the products away."""
    site = next(m for m in pipeline.unet.modules() if isinstance(m, Attention))
    del site._modules["processor"]
    site.processor = AttnProcessor2_0()
    told = refused(lambda: pipeline.save_pretrained(tmp_path / "out"))
    assert "has lost the tensor" in told
    pipeline = copy.deepcopy(_quantized(8))
    pipeline.unet.register_buffer("more", torch.zeros(1))
    told = refused(lambda: pipeline.save_pretrained(tmp_path / "other"))
    assert "has gained the tensor 'more'" in told


def test_packed_projections_are_not_fused(pipeline):
    assert "fuse_qkv_projections was called on a UNet2DConditionModel with" in refused(
        pipeline.unet.fuse_qkv_projections
    )


def test_a_model_that_cannot_be_built_again_is_refused_before_the_work(tmp_path):
    pipeline, arguments = build("sd"), ARCHITECTURES["sd"].arguments
    pipeline.fuse_qkv_projections()
    run = functools.partial(quantize, pipeline, "minmax", steps=2, settings=FEW, **arguments)
    told = refused(lambda: run(out=tmp_path / "out"))
    assert "to_qkv', which its config does not describe" in told
    assert list(tmp_path.iterdir()) == []
    result = run().pipeline
    assert "to_qkv" in refused(lambda: result.save_pretrained(tmp_path / "out"))
