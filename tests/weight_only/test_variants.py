"""Folders that have their weights in a variant only, such as `*.fp16.safetensors`.

Varied: one file and shards, all components and some; loading, calibrated and weight-only
quantization, saving with `variant=`. The control is the folder without a variant.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig

from architectures import ARCHITECTURES, build
from quantize_runs import FAST_MINMAX, tree
from stepquant.api import WeightOnlyConfig, load, quantize, sample

DRAW = {"prompts": "a"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    pipeline = build("sd")
    pipeline.save_pretrained(folder / "plain")
    pipeline.save_pretrained(folder / "fp16", variant="fp16")
    pipeline.save_pretrained(folder / "shards", variant="fp16", max_shard_size="20KB")
    shutil.rmtree(folder / "shards" / "text_encoder")  # which the pipeline does not split
    pipeline.text_encoder.save_pretrained(
        folder / "shards" / "text_encoder", variant="fp16", max_shard_size="10KB"
    )
    shutil.copytree(folder / "fp16", folder / "some")
    shutil.rmtree(folder / "some" / "text_encoder")
    shutil.copytree(folder / "plain" / "text_encoder", folder / "some" / "text_encoder")
    return folder


def files(folder):
    return sorted(name for name in tree(folder) if "safetensors" in name)


@pytest.mark.parametrize("name", ["fp16", "shards", "some"])
def test_the_weight_only_model_has_no_variant(folders, tmp_path, name):
    wanted = quantize(folders / "plain", "weight-only", out=tmp_path / "plain").pipeline
    quantize(folders / name, "weight-only", out=tmp_path / "out")
    assert not [file for file in files(tmp_path / "out") if "fp16" in file]
    if name == "shards":
        indices = sorted((tmp_path / "out").rglob("*.index.json"))
        assert [index.parent.name for index in indices] == ["text_encoder", "vae"]
        for index in indices:
            for shard in json.loads(index.read_text())["weight_map"].values():
                assert (index.parent / shard).is_file()
    else:
        assert files(tmp_path / "out") == files(tmp_path / "plain")
    for found in (load(tmp_path / "out"), DiffusionPipeline.from_pretrained(tmp_path / "out")):
        assert torch.equal(sample(found, 1, 2, **DRAW), sample(wanted, 1, 2, **DRAW))


@pytest.mark.parametrize("name", ["fp16", "shards", "some"])
def test_the_float_model_is_loaded_quantized_and_saved(folders, tmp_path, name):
    wanted = sample(folders / "plain", 1, 2, **DRAW)
    assert torch.equal(sample(folders / name, 1, 2, **DRAW), wanted)
    settings = {"steps": 2, "settings": FAST_MINMAX, **ARCHITECTURES["sd"].arguments}
    for source, out in ((folders / name, "out"), (folders / "plain", "plain")):
        quantize(source, "minmax", 8, 8, out=tmp_path / out, **settings)
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")


@pytest.mark.parametrize("way", ["calibrated", "weight-only", "at load"])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_a_quantized_model_is_saved_in_a_variant(folders, tmp_path, way, shard):
    if way == "at load":
        mapping = {"unet": WeightOnlyConfig(), "text_encoder": WeightOnlyConfig()}
        pipeline = DiffusionPipeline.from_pretrained(
            folders / "fp16",
            variant="fp16",
            quantization_config=PipelineQuantizationConfig(quant_mapping=mapping),
        )
    elif way == "calibrated":
        settings = {"steps": 2, "settings": FAST_MINMAX, **ARCHITECTURES["sd"].arguments}
        pipeline = quantize(folders / "plain", "minmax", 8, 8, **settings).pipeline
    else:
        pipeline = quantize(folders / "plain", way, out=tmp_path / "w4").pipeline
    wanted = sample(pipeline, 1, 2, **DRAW)
    pipeline.save_pretrained(tmp_path / "saved", variant="int8", max_shard_size=shard)
    assert all(".int8" in file for file in files(tmp_path / "saved"))
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", variant="int8")
    for found in (load(tmp_path / "saved"), again):
        assert torch.equal(sample(found, 1, 2, **DRAW), wanted)
