"""Pipelines with absent components, and of classes of the user's own, load after a save."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin as BASE

from architectures import ARCHITECTURES, build
from quantize_runs import FAST_MINMAX, refused
from stepquant.api import load, quantize, sample
from stepquant.checkpoint.load import load_pipeline

ARGUMENTS = ARCHITECTURES["sd3"].arguments


class OwnPipeline(StableDiffusionPipeline):
    """Of a user."""


class OwnUNet(UNet2DConditionModel):
    """Of a user."""


def run(pipeline, out, **conditions):
    return quantize(pipeline, "minmax", steps=2, out=out, settings=FAST_MINMAX, **conditions)


@pytest.mark.parametrize("way", ["calibrated", "weight-only", "float"])
def test_components_that_are_none_stay_none(tmp_path, way):
    pipeline = build("sd3")
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    out = tmp_path / "out"
    if way == "calibrated":
        run(pipeline, out, **ARGUMENTS)
    else:
        pipeline.save_pretrained(tmp_path / "float")
        out = tmp_path / "float"
    if way == "weight-only":
        quantize(tmp_path / "float", "weight-only", out=tmp_path / "packed")
        out = tmp_path / "packed"
    loaded = load(out)
    absent = {name for name, part in pipeline.components.items() if part is None}
    assert {name for name, part in loaded.components.items() if part is None} == absent
    assert {"text_encoder_3", "tokenizer_3"} <= absent
    images = sample(out, 1, 2, **ARGUMENTS)
    assert torch.equal(images, sample(loaded, 1, 2, **ARGUMENTS))
    if way == "float":
        assert torch.equal(images, sample(pipeline, 1, 2, **ARGUMENTS))


def test_a_pipeline_class_of_the_users_own_is_loaded_where_it_is_known(tmp_path):
    parts = build("sd").components
    result = run(OwnPipeline(**parts, requires_safety_checker=False), tmp_path / "out", prompts="a")
    loaded = load(tmp_path / "out")
    assert type(loaded) is OwnPipeline
    images = sample(result.pipeline, 1, 2, prompts="a")
    assert torch.equal(sample(tmp_path / "out", 1, 2, prompts="a"), images)


def test_elsewhere_the_class_is_named(tmp_path):
    parts = build("sd").components
    OwnPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path / "own")
    code = (
        "import sys\nfrom stepquant.checkpoint.load import load_pipeline\n"
        "try:\n    load_pipeline(sys.argv[1])\nexcept ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "own"], capture_output=True, text=True
    )
    assert "is of the pipeline class 'OwnPipeline'" in done.stdout, done.stderr
    assert "import the module that defines it" in done.stdout


def own_unet(pipeline):
    own = OwnUNet.from_config(pipeline.unet.config).eval()
    own.load_state_dict(pipeline.unet.state_dict())
    pipeline.register_modules(unet=own)
    return pipeline


def test_a_denoiser_class_of_the_users_own_is_found_by_its_module(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[OwnUNet.__module__], "ModelMixin", BASE, raising=False)
    run(own_unet(build("sd")), tmp_path / "out", prompts="a")
    assert type(load(tmp_path / "out").unet) is OwnUNet
    path = tmp_path / "out" / "model_index.json"
    index = json.loads(path.read_text())
    assert index["unet"] == [OwnUNet.__module__, "OwnUNet"]
    path.write_text(json.dumps({**index, "unet": ["no_such_module", "OwnUNet"]}))
    (tmp_path / "out" / "stepquant_sha256.json").unlink()
    assert "no_such_module" in refused(lambda: load_pipeline(tmp_path / "out"))


def test_a_class_that_diffusers_could_not_load_again_is_refused_before_the_work(tmp_path):
    pipeline = own_unet(build("sd"))
    message = refused(lambda: run(pipeline, tmp_path / "out", prompts="a"))
    assert f"'unet' is a OwnUNet of the module '{OwnUNet.__module__}'" in message
    assert "expected ModelMixin among the names of that module" in message
    assert run(pipeline, None, prompts="a").record["bits"] == "w8a8"
