"""Packing without calibration: the same bytes as in memory, in little of it."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES, build, condition_unet
from quantize_runs import Lines, left, refused, tree
from stepquant.api import pack, quantize, sample
from stepquant.calibration.ranges import search_weight_range
from stepquant.quantizers.weight import minmax_weight_range
from stepquant.runtime.layers.weight_only import WeightOnly
from stepquant.support.progress import Reporter
from stepquant.weight_only.conversion import convert
from stepquant.weight_only.quantizers import quantize_weights
from stepquant.weight_only.streaming import stream_weights

STEPS = 3
WEIGHTS = "diffusion_pytorch_model.safetensors"
QUIET = Reporter(quiet=True)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sd_folder(tmp_path):
    build("sd").save_pretrained(tmp_path / "sd")
    return tmp_path / "sd"


def unet_folder(path, shard, dtype=torch.bfloat16):
    torch.manual_seed(0)
    condition_unet().to(dtype).save_pretrained(path, max_shard_size=shard)
    return path


def without_origin(files):
    """The config without the place that a model was loaded from, which `convert` takes off."""
    config = {**json.loads(files["config.json"])}
    config.pop("_name_or_path", None)
    return {**files, "config.json": config}


@pytest.mark.parametrize(("source_shard", "shard"), [("10GB", 1 << 30), ("20KB", 16 << 10)])
@pytest.mark.parametrize(
    ("bits", "grids", "find"),
    [
        (8, None, minmax_weight_range),
        (4, "minmax", minmax_weight_range),
        (4, "mse", search_weight_range),
    ],
)
def test_the_bytes_are_those_of_packing_the_whole_model_in_memory(
    tmp_path, source_shard, shard, bits, grids, find
):
    source = unet_folder(tmp_path / "float", source_shard)
    outer = ("conv_in", "conv_out")
    model = UNet2DConditionModel.from_pretrained(source, dtype=torch.bfloat16)
    quantize_weights(model, "it", bits, grids, find, outer)
    model.save_pretrained(tmp_path / "whole", max_shard_size=shard)
    found = stream_weights(
        source, tmp_path / "streamed", "it", bits, grids, find, lambda _: outer, QUIET, shard
    )
    assert found["parameters"] == sum(p.numel() for p in condition_unet().parameters())
    whole, streamed = tree(tmp_path / "whole"), tree(tmp_path / "streamed")
    assert len(whole) == (2 if shard > 1 << 20 else len(whole)) and len(whole) >= 2
    assert (shard < 1 << 20) == any(name.endswith("index.json") for name in whole)
    assert without_origin(streamed) == without_origin(whole)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "streamed", dtype=torch.bfloat16)
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_packed_pipeline_draws_what_its_weights_stand_for(name, tmp_path):
    pipeline = build(name)
    pipeline.save_pretrained(tmp_path / "float")
    record = convert(tmp_path / "float", tmp_path / "out", components={"vae": "w8"})
    component = ARCHITECTURES[name].component
    assert record["denoiser"] == component and record["bits"] == "w4"
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    loaded.set_progress_bar_config(disable=True)
    denoiser = getattr(loaded, component)
    layers = [m for m in denoiser.modules() if isinstance(m, WeightOnly)]
    assert len(layers) == record["components"][component]["layers"] > 5
    arguments = ARCHITECTURES[name].arguments
    images = sample(loaded, 2, STEPS, **arguments)
    assert torch.equal(sample(tmp_path / "out", 2, STEPS, **arguments), images)
    # The float model with the weights of the packed ones gives the same.
    for layer_name, layer in denoiser.named_modules():
        if isinstance(layer, WeightOnly):
            plain = getattr(pipeline, component).get_submodule(layer_name)
            plain.weight.data.copy_(layer.float_weight(torch.float32))
    pipeline.register_modules(vae=loaded.vae)
    assert torch.equal(sample(pipeline, 2, STEPS, **arguments), images)


def test_what_is_not_packed_is_copied_and_equal_runs_write_equal_bytes(sd_folder, tmp_path):
    for name in ("a", "b"):
        convert(sd_folder, tmp_path / name)
    files, before = tree(tmp_path / "a"), tree(sd_folder)
    assert files == tree(tmp_path / "b")
    assert files["vae/" + WEIGHTS] == before["vae/" + WEIGHTS]
    assert files["tokenizer/tokenizer.json"] == before["tokenizer/tokenizer.json"]
    assert len(files["unet/" + WEIGHTS]) < 0.4 * len(before["unet/" + WEIGHTS])


def test_the_input_and_output_layers_stay_float_in_their_dtype(sd_folder, tmp_path):
    UNet2DConditionModel.from_pretrained(sd_folder / "unet", dtype=torch.bfloat16).save_pretrained(
        sd_folder / "unet"
    )
    convert(sd_folder, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "unet" / WEIGHTS)
    assert tensors["conv_in.weight"].dtype == tensors["conv_out.bias"].dtype == torch.bfloat16
    assert tensors["mid_block.resnets.0.conv1.weight"].dtype == torch.int8
    assert tensors["mid_block.resnets.0.conv1.weight_scale"].dtype == torch.float32


def test_a_model_without_an_adapter_is_packed_and_said_so(sd_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("stepquant.weight_only.conversion.ADAPTERS", {})
    lines = Lines()
    convert(sd_folder, tmp_path / "out", reporter=lines)
    assert "UNet2DConditionModel is unknown" in lines.lines[0]
    assert load_file(tmp_path / "out" / "unet" / WEIGHTS)["conv_in.weight"].dtype == torch.int8


def rewrite(folder, act):
    path = folder / "unet" / WEIGHTS
    tensors = load_file(path)
    act(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda t: t["conv_in.weight"].fill_(torch.nan), "'conv_in.weight' of the component 'unet"),
        (lambda t: t.pop("conv_in.bias"), "lack the tensor 'conv_in.bias'"),
        (lambda t: t.update(more=torch.ones(1)), "hold the unexpected tensor 'more'"),
        (lambda t: t.update({"conv_in.bias": torch.ones(3)}), "of shape [3]: expected floats of"),
    ],
)
def test_bad_files_are_named_and_nothing_is_left(sd_folder, tmp_path, act, words):
    rewrite(sd_folder, act)
    before = left(tmp_path)
    assert words in refused(lambda: convert(sd_folder, tmp_path / "out"))
    assert left(tmp_path) == before


def test_what_cannot_be_packed_is_refused(sd_folder, tmp_path):
    def message(model=sd_folder, out=tmp_path / "out", **more):
        return refused(lambda: convert(model, out, **more))

    assert "weights is 3: expected one of 4, 8" in message(weights=3)
    assert "grids is 'best': expected one of minmax, mse" in message(grids="best")
    assert "'text_encoder' cannot be quantized: expected one of vae" in message(
        components={"text_encoder": "w8"}
    )
    assert "the component 'vae' is set to 'w2'" in message(components={"vae": "w2"})
    assert "exists: expected a new one" in message(out=sd_folder)
    assert "is a single file: expected a diffusers pipeline folder" in message(
        sd_folder / "unet" / WEIGHTS
    )
    convert(sd_folder, tmp_path / "once")
    assert "'unet' is quantized already" in message(tmp_path / "once")
    assert "is quantized already: expected a float model" in refused(
        lambda: quantize(tmp_path / "once", "minmax", prompts="a")
    )


def test_the_old_name_writes_the_same_bytes_and_says_the_new_one(sd_folder, tmp_path):
    convert(sd_folder, tmp_path / "new", 8, components={"vae": "w4"})
    with pytest.warns(DeprecationWarning, match=r"quantize\(model, 'weight-only', weights=8, out="):
        record = pack(sd_folder, tmp_path / "old", 8, components={"vae": "w4"})
    assert tree(tmp_path / "old") == tree(tmp_path / "new")
    assert record["bits"] == "w8" and "recipe" not in record
