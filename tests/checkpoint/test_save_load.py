"""What is saved is what is loaded: same outputs, same bytes, same dtypes, real size."""

import gc
import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, PipelineQuantizationConfig, UNet2DModel
from diffusers.models import modeling_utils
from safetensors import safe_open

from packed_models import (
    SCALED,
    SPLIT,
    STATIC,
    STEPS,
    WEIGHTS,
    outputs,
    packed_pipeline,
    packed_unet,
    unet,
)
from stepquant.checkpoint.config import StepQuantConfig
from stepquant.checkpoint.load import load_pipeline
from stepquant.checkpoint.save import attach_config, describe_layers, save_pipeline
from stepquant.checkpoint.validate import packed_layers
from stepquant.quantizers import StepGrid
from stepquant.runtime.layers.released import Released
from stepquant.runtime.layers.resident import set_memory_mode
from stepquant.support.errors import StepQuantError


@pytest.fixture(scope="module")
def pipeline():
    return packed_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    return save_pipeline(pipeline, "unet", tmp_path_factory.mktemp("saved") / "pipeline")


def assert_same_outputs(left, right):
    for a, b in zip(outputs(left), outputs(right), strict=True):
        assert torch.equal(a, b)


def assert_same_files(left, right):
    files = sorted(path.relative_to(left) for path in left.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(right) for path in right.rglob("*") if path.is_file())
    for file in files:
        assert (left / file).read_bytes() == (right / file).read_bytes(), file


LOADERS = {
    "UNet2DModel": lambda folder: UNet2DModel.from_pretrained(folder, subfolder="unet"),
    "DDPMPipeline": lambda folder: DDPMPipeline.from_pretrained(folder).unet,
    "load_pipeline": lambda folder: load_pipeline(folder).unet,
    "device_map": lambda folder: UNet2DModel.from_pretrained(
        folder, subfolder="unet", device_map={"": "cpu"}
    ),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_loaded_model_gives_equal_bits(pipeline, folder, load):
    assert_same_outputs(pipeline.unet, load(folder))


def test_the_model_under_test_has_every_kind_of_layer(folder):
    layers = describe_layers(load_pipeline(folder).unet)
    assert layers[SPLIT].splits == (16, 16)
    assert layers[SCALED].tensors == {"act_channel_scale"}
    assert (layers[STATIC].steps, layers[STATIC].weight_bits) == (1, 8)
    assert (layers[SPLIT].steps, layers[SPLIT].weight_bits) == (STEPS, 4)


def test_pipeline_samples_equal_images(pipeline, folder):
    def sample(pipe):
        generator = torch.Generator().manual_seed(0)
        pipe.set_progress_bar_config(disable=True)
        return pipe(1, generator, num_inference_steps=3, output_type="np").images

    assert (sample(pipeline) == sample(DDPMPipeline.from_pretrained(folder))).all()


def test_saving_a_loaded_pipeline_writes_equal_bytes(folder, tmp_path):
    again = save_pipeline(load_pipeline(folder), "unet", tmp_path / "again")
    assert_same_files(folder, again)


@pytest.mark.parametrize("mode", ["fast", "low"])
def test_saving_a_model_that_has_run_writes_equal_bytes(folder, tmp_path, mode):
    loaded = load_pipeline(folder)
    set_memory_mode(loaded.unet, mode)
    outputs(loaded.unet)
    kept = [
        isinstance(layer.weight_packed, Released) for layer in packed_layers(loaded.unet).values()
    ]
    assert any(kept) == (mode == "fast")
    save_pipeline(loaded, "unet", tmp_path / "again")
    assert_same_files(folder, tmp_path / "again")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_loaded_model_does_not_keep_its_file_mapped(pipeline, tmp_path):
    folder = save_pipeline(pipeline, "unet", tmp_path / "saved")
    loaded = load_pipeline(folder)
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert_same_outputs(pipeline.unet, loaded.unet)


def test_save_pretrained_of_a_loaded_model_writes_equal_weights(folder, tmp_path):
    UNet2DModel.from_pretrained(folder, subfolder="unet").save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (folder / "unet" / WEIGHTS).read_bytes()


def test_two_equal_runs_write_equal_bytes(folder, tmp_path):
    assert_same_files(folder, save_pipeline(packed_pipeline(), "unet", tmp_path / "other"))


def test_header_metadata_is_diffusers_own(folder):
    with safe_open(folder / "unet" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_tensors_keep_their_bits_in_a_low_precision_model(folder, pipeline, dtype):
    model = UNet2DModel.from_pretrained(folder, subfolder="unet", dtype=dtype)
    assert model.dtype == model.conv_norm_out.weight.dtype == dtype
    layers = packed_layers(pipeline.unet)
    for name, layer in packed_layers(model).items():
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, layers[name].state_dict()[key]), f"{name}.{key}"
            assert tensor.dtype in (torch.float32, torch.uint8)
    assert model.step_grid.dtype == torch.float32
    for low, full in zip(outputs(model, dtype), outputs(pipeline.unet), strict=True):
        assert low.dtype == dtype
        assert (low - full).abs().max() < 0.1 * full.abs().max()


@pytest.mark.parametrize("parallel", [False, True])
def test_sharded_checkpoint_loads(pipeline, tmp_path, monkeypatch, parallel):
    pipeline.unet.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", parallel)
    assert_same_outputs(pipeline.unet, UNet2DModel.from_pretrained(tmp_path))


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 6, 7, 8])
def test_every_bit_width_loads(bits, tmp_path):
    model = attach_config(packed_unet(weight_bits=bits), StepQuantConfig())
    model.save_pretrained(tmp_path)
    assert_same_outputs(model, UNet2DModel.from_pretrained(tmp_path))


def test_four_bit_checkpoint_is_at_most_a_sixth_and_a_half_of_float32(tmp_path):
    """The bound of a 1.8 M-parameter UNet; header and tables weigh most in a small model."""
    sizes = {
        "sample_size": 32,
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "attention_head_dim": 32,
    }
    parameters = sum(p.numel() for p in unet(**sizes).parameters())
    folder = save_pipeline(packed_pipeline(steps=50, **sizes), "unet", tmp_path / "packed")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size * 6.5 <= 4 * parameters


def test_config_through_a_pipeline_quantization_config_is_the_folders_own(folder, pipeline):
    config = PipelineQuantizationConfig(quant_mapping={"unet": StepQuantConfig()})
    with pytest.warns(UserWarning, match="will be used"):
        loaded = DDPMPipeline.from_pretrained(folder, quantization_config=config)
    assert_same_outputs(pipeline.unet, loaded.unet)


def test_config_for_a_float_model_says_how_to_quantize(tmp_path):
    DDPMPipeline(unet(), packed_pipeline().scheduler).save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(quant_mapping={"unet": StepQuantConfig()})
    with pytest.raises(StepQuantError, match="run `stepquant quantize MODEL --recipe"):
        DDPMPipeline.from_pretrained(tmp_path, quantization_config=config)


def test_dequantized_model_computes_the_packed_weights_in_float(folder, tmp_path):
    packed = load_pipeline(folder).unet
    model = load_pipeline(folder).unet.dequantize()
    layers = packed_layers(packed)
    assert not packed_layers(model)
    for name, layer in layers.items():
        new = model.get_submodule(name)
        weight = layer.float_weight()
        if layer.act_channel_scale is not None:  # the float layer's input is not divided
            weight = weight / layer.act_channel_scale
        assert torch.equal(new.weight, weight), name
    for a, b in zip(outputs(packed), outputs(model), strict=True):
        assert (a - b).abs().max() < 0.1 * b.abs().max()  # the activations' rounding
    model.save_pretrained(tmp_path)
    assert_same_outputs(model, UNet2DModel.from_pretrained(tmp_path))


def test_attach_config_takes_layers_and_steps_from_the_model():
    model = packed_unet()
    config = StepQuantConfig()
    attach_config(model, config)
    assert config.layers == describe_layers(model)
    assert config.steps == STEPS
    assert torch.equal(model.step_grid, model.conv_in.context.grid.timesteps)


def test_attach_config_refuses_a_float_model():
    with pytest.raises(StepQuantError, match="UNet2DModel has no packed layer"):
        attach_config(unet(), StepQuantConfig())


def test_attach_config_refuses_two_step_contexts():
    model = packed_unet()
    model.conv_out = packed_unet().conv_out
    with pytest.raises(StepQuantError, match="layers of several step contexts"):
        attach_config(model, StepQuantConfig())


def test_attach_config_refuses_what_a_load_would_refuse():
    model = packed_unet()
    model.conv_in.act_scale.fill_(float("nan"))
    with pytest.raises(StepQuantError, match=r"'conv_in.act_scale' holds nan at \[0, 0\]"):
        attach_config(model, StepQuantConfig())


def test_attach_config_refuses_a_step_grid_of_another_length():
    model = packed_unet()
    model.conv_in.context.grid = StepGrid(torch.arange(3))
    with pytest.raises(StepQuantError, match=f"steps of layer '.*' .* is {STEPS}: expected 3"):
        attach_config(model, StepQuantConfig())


def test_pickle_is_refused_on_saving(pipeline, tmp_path):
    with pytest.raises(StepQuantError, match="pickle files are refused"):
        pipeline.unet.save_pretrained(tmp_path, safe_serialization=False)


def test_files_have_the_users_usual_modes(pipeline, tmp_path):
    mask = os.umask(0o022)
    try:
        folder = save_pipeline(pipeline, "unet", tmp_path / "modes")
    finally:
        os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert (folder / "unet" / WEIGHTS).stat().st_mode & 0o777 == 0o644


def test_nothing_in_the_config_tells_where_it_was_made(folder):
    text = "".join(path.read_text() for path in folder.rglob("*.json"))
    assert "_name_or_path" not in text and str(folder.parent) not in text
    assert json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]


def test_a_bias_of_the_step_is_kept_and_only_its_layer_says_so(tmp_path):
    pipeline = packed_pipeline(step_bias=True)
    folder = save_pipeline(pipeline, "unet", tmp_path / "pipeline")
    config = json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]
    assert "step_bias" not in config["layer_default"]
    assert [n for n, v in config["layers"].items() if "step_bias" in v] == ["conv_out"]
    loaded = load_pipeline(folder)
    assert_same_outputs(pipeline.unet, loaded.unet)
    assert loaded.unet.conv_out.step_bias.view(-1).tolist() == [-1, -0.5, 0, 0.5, 1]
    again = save_pipeline(loaded, "unet", tmp_path / "again")
    assert_same_files(folder, again)
    # It stands for what rounding did to the float layer, which is gone when nothing is rounded.
    bias = loaded.unet.conv_out.bias.clone()
    assert torch.equal(loaded.unet.dequantize().conv_out.bias, bias)
