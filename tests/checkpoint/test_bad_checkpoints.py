"""Every kind of damaged checkpoint is refused with a sentence that names the thing."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel

from packed_models import MIXED, SCALED, SPLIT, STEPS, WEIGHTS, packed_pipeline, tampered
from stepquant.checkpoint.load import load_pipeline
from stepquant.checkpoint.save import save_pipeline
from stepquant.support.errors import StepQuantError

LAYER = "up_blocks.0.resnets.0.conv2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pipeline = packed_pipeline()
    return save_pipeline(pipeline, "unet", tmp_path_factory.mktemp("saved") / "pipeline")


def replace(name, change):
    return lambda tensors, config: tensors.update({name: change(tensors[name]).contiguous()})


def put(name, index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return replace(name, change)


def in_config(change):
    return lambda tensors, config: change(config)


CASES = {
    "missing tensor": (
        lambda tensors, config: tensors.pop(f"{LAYER}.act_scale"),
        f"lacks the tensor '{LAYER}.act_scale': expected exactly the",
    ),
    "missing float tensor": (
        lambda tensors, config: tensors.pop("conv_norm_out.weight"),
        "lacks the tensor 'conv_norm_out.weight'",
    ),
    "two missing tensors": (
        lambda tensors, config: (tensors.pop("step_grid"), tensors.pop("conv_in.bias")),
        "lacks the tensor 'conv_in.bias' and 1 more",
    ),
    "missing checksum": (
        lambda tensors, config: tensors.pop("stepquant_sha256"),
        "lacks the tensor 'stepquant_sha256'",
    ),
    "extra tensor": (
        lambda tensors, config: tensors.update({f"{LAYER}.weight": torch.zeros(3)}),
        f"holds the unexpected tensor '{LAYER}.weight'",
    ),
    "wrong shape": (
        replace(f"{LAYER}.weight_scale", lambda t: t[:, :-1]),
        rf"'{LAYER}.weight_scale' has shape \(1, 15\): expected \(1, 16\)",
    ),
    "wrong shape of a float tensor": (
        replace("conv_norm_out.bias", lambda t: t[:-1]),
        r"'conv_norm_out.bias' has shape \(15,\): expected \(16,\)",
    ),
    "wrong dtype of scales": (
        replace(f"{LAYER}.act_scale", lambda t: t.to(torch.bfloat16)),
        f"'{LAYER}.act_scale' has dtype torch.bfloat16: expected torch.float32",
    ),
    "wrong dtype of codes": (
        replace(f"{LAYER}.weight_packed", lambda t: t.to(torch.int16)),
        f"'{LAYER}.weight_packed' has dtype torch.int16: expected torch.uint8",
    ),
    "wrong dtype of a float tensor": (
        replace("conv_norm_out.bias", lambda t: t.to(torch.int64)),
        "'conv_norm_out.bias' has dtype torch.int64: expected a floating-point dtype",
    ),
    "wrong dtype of the checksum": (
        replace("stepquant_sha256", lambda t: t.to(torch.int64)),
        "'stepquant_sha256' is torch.int64",
    ),
    "table too short": (
        replace(f"{LAYER}.act_scale", lambda t: t[:, :3]),
        rf"'{LAYER}.act_scale' has shape \(1, 3\): expected \(1, {STEPS}\), that is, input parts x"
        rf" rows of the step table \({STEPS}\)",
    ),
    "table of one part": (
        replace(f"{SPLIT}.act_zero_point", lambda t: t[:1]),
        rf"'{SPLIT}.act_zero_point' has shape \(1, {STEPS}\): expected \(2, {STEPS}\)",
    ),
    "step grid too short": (
        replace("step_grid", lambda t: t[:3]),
        rf"'step_grid' has shape \(3,\): expected \({STEPS},\)",
    ),
    "infinite weight scale": (
        put(f"{LAYER}.weight_scale", (0, 2), float("inf")),
        rf"'{LAYER}.weight_scale' holds inf at \[0, 2\]: expected finite positive scales",
    ),
    "activation scale not a number": (
        put(f"{LAYER}.act_scale", (0, 1), float("nan")),
        rf"'{LAYER}.act_scale' holds nan at \[0, 1\]: expected finite positive scales",
    ),
    "activation scale of zero": (
        put(f"{LAYER}.act_scale", (0, 1), 0.0),
        rf"'{LAYER}.act_scale' holds 0.0 at \[0, 1\]",
    ),
    "activation scale without an inverse": (
        put(f"{LAYER}.act_scale", (0, 1), 1e-45),
        rf"'{LAYER}.act_scale' holds 1.4\S+ at \[0, 1\]",
    ),
    "negative channel scale": (
        put(f"{SCALED}.act_channel_scale", 3, -1.0),
        rf"'{SCALED}.act_channel_scale' holds -1.0 at \[3\]",
    ),
    "bias not a number": (
        put(f"{LAYER}.bias", 0, float("nan")),
        rf"'{LAYER}.bias' holds nan at \[0\]: expected finite numbers",
    ),
    "activation zero point above the largest code": (
        in_config(lambda config: config["layers"][LAYER].update(activation_bits=4)),
        rf"'{LAYER}.act_zero_point' holds 128 at \[0, 0\]: expected at most 15",
    ),
    "weight zero point above the largest code": (
        put(f"{LAYER}.weight_zero_point", (0, 0), 16),
        rf"'{LAYER}.weight_zero_point' holds 16 at \[0, 0\]: expected at most 15",
    ),
    "eight-bit weight zero point": (
        put("conv_in.weight_zero_point", (0, 0), 127),
        r"'conv_in.weight_zero_point' holds 127 at \[0, 0\]: expected 128 everywhere",
    ),
    "bits that do not match the packed size": (
        in_config(lambda config: config["layers"][LAYER].update(weight_bits=3)),
        rf"'{LAYER}.weight_packed' has shape \(1152,\): expected \(864,\) bytes, which 2304 codes "
        "of 3 bits take",
    ),
    "channel bits that the config does not count": (
        put(f"{MIXED}.channel_bits", 0, 5),
        rf"'{MIXED}.channel_bits' holds the \(bits, out-channels\) "
        r"\[\(3, 5\), \(4, 5\), \(5, 6\)\]: "
        r"expected \[\(3, 6\), \(4, 5\), \(5, 5\)\]",
    ),
    "channel bits that do not fit": (
        put(f"{MIXED}.channel_bits", 0, 9),
        rf"'{MIXED}.channel_bits' holds the \(bits, out-channels\)",
    ),
    "counts that do not add up": (
        in_config(
            lambda config: config["layers"][MIXED].update(channel_counts=[[3, 6], [4, 5], [5, 6]])
        ),
        f"channel_counts of layer '{MIXED}' add up to 17 channels: expected 16",
    ),
    "counts that do not match the packed size": (
        in_config(
            lambda config: config["layers"][MIXED].update(channel_counts=[[3, 5], [4, 5], [5, 6]])
        ),
        rf"'{MIXED}.weight_packed' has shape .* codes of 4.0625 bits take",
    ),
    "zero point above a channel's largest code": (
        put(f"{MIXED}.weight_zero_point", (0, 0), 15),
        rf"'{MIXED}.weight_zero_point' holds 15 at \[0, 0\]",
    ),
    "changed weight code": (
        put(f"{LAYER}.weight_packed", 7, 99),
        "tensors and layers of the checkpoint have the SHA-256 .*: expected .*",
    ),
    "changed float weight": (
        put("conv_norm_out.weight", 0, 1.5),
        "tensors and layers of the checkpoint have the SHA-256",
    ),
    "changed timestep": (
        put("step_grid", 0, 1.0),
        "tensors and layers of the checkpoint have the SHA-256",
    ),
    "changed activation bits": (
        in_config(lambda config: config["layers"]["conv_in"].update(activation_bits=7)),
        "'conv_in.act_zero_point' holds 128",
    ),
    "unknown layer": (
        in_config(lambda config: config["layers"].update({"mid_block.nowhere": {}})),
        "names the layer 'mid_block.nowhere', which UNet2DModel does not have",
    ),
    "layer that is not linear": (
        in_config(lambda config: config["layers"].update({"conv_norm_out": {}})),
        r"layer 'conv_norm_out' is a GroupNorm in the model: expected nn.Linear",
    ),
    "layer left out of the config": (
        in_config(lambda config: config["layers"].pop(LAYER)),
        f"lacks the tensor '{LAYER}.weight'",
    ),
    "splits that do not add up": (
        in_config(lambda config: config["layers"][SPLIT].update(splits=[16, 8])),
        rf"splits \(16, 8\) of layer '{SPLIT}' add up to 24 channels: expected 32",
    ),
    "other number of steps": (
        in_config(lambda config: config.update(steps=7)),
        f"steps of layer .* is {STEPS}: expected 7",
    ),
    "newer format": (
        in_config(lambda config: config.update(format_version=2)),
        "has format version 2: expected at most 1.*upgrade stepquant",
    ),
    "kind that is an object": (
        in_config(lambda config: config["layers"]["conv_in"].update(kind={})),
        "kind of layer 'conv_in' in the quantization config is .*: expected one of linear, conv2d",
    ),
    "unknown key": (
        in_config(lambda config: config.update(group_size=64)),
        "unknown key 'group_size'",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), CASES.values(), ids=CASES)
def test_is_refused_by_the_model_and_by_the_pipeline(folder, tmp_path, change, sentence):
    bad = tmp_path / "pipeline"
    shutil.copytree(folder, bad, ignore=shutil.ignore_patterns("unet"))
    tampered(folder / "unet", bad / "unet", change)
    for load in (
        lambda: UNet2DModel.from_pretrained(bad, subfolder="unet"),
        lambda: DDPMPipeline.from_pretrained(bad),
        lambda: load_pipeline(bad),
    ):
        with pytest.raises(StepQuantError, match=sentence):
            load()


def test_the_untampered_copy_loads(folder, tmp_path):
    tampered(folder / "unet", tmp_path / "unet", lambda tensors, config: None)
    UNet2DModel.from_pretrained(tmp_path / "unet")


def test_layers_on_the_disk_are_refused(folder, tmp_path):
    with pytest.raises(StepQuantError, match="device_map puts all layers on 'disk'"):
        UNet2DModel.from_pretrained(
            folder, subfolder="unet", device_map={"": "disk"}, offload_folder=tmp_path
        )


def test_pickled_weights_are_refused_by_the_model(folder, tmp_path):
    shutil.copytree(folder / "unet", tmp_path / "unet")
    (tmp_path / "unet" / WEIGHTS).unlink()
    torch.save({"a": torch.zeros(1)}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(StepQuantError, match="not a safetensors file: pickle files are refused"):
        UNet2DModel.from_pretrained(tmp_path / "unet")


def test_config_with_json_numbers_as_text_is_refused(folder, tmp_path):
    shutil.copytree(folder / "unet", tmp_path / "unet")
    path = tmp_path / "unet" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["steps"] = str(STEPS)
    path.write_text(json.dumps(config))
    with pytest.raises(StepQuantError, match="steps of the quantization config is '5'"):
        UNet2DModel.from_pretrained(tmp_path / "unet")


def test_tensors_that_diffusers_keeps_on_the_disk_are_refused(folder):
    with pytest.raises(StepQuantError, match="load without offload_folder and offload_state_dict"):
        UNet2DModel.from_pretrained(folder, subfolder="unet", offload_state_dict=True)
