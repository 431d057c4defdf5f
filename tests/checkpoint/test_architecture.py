"""The values that a model is built from are part of what a checkpoint's checksum covers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import UNet2DModel

from packed_models import STEPS, outputs, packed_pipeline
from stepquant.checkpoint.architecture import architecture_of, check_architecture
from stepquant.checkpoint.load import load_pipeline
from stepquant.checkpoint.save import save_pipeline
from stepquant.support.errors import StepQuantError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(packed_pipeline(), "unet", tmp_path_factory.mktemp("saved") / "pipeline")


def edited(folder, target, change):
    """A copy of the denoiser's folder with another `config.json`."""
    shutil.copytree(folder / "unet", target)
    path = target / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return target


def renamed(values):
    values["act_fm"] = values.pop("act_fn")
    values["quantization_config"]["architecture"]["act_fn"] = "relu"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda v: v.update(act_fn="relu"), "'act_fn' in config.json of UNet2DModel is 'relu'"),
        (lambda v: v.update(norm_eps=1e-3), "'norm_eps' .* is 0.001: expected 1e-05, as the quant"),
        (lambda v: v.update(freq_shift=1), "'freq_shift' .* is 1: expected 0"),
        (lambda v: v.update(flip_sin_to_cos=False), "'flip_sin_to_cos' .* is False"),
        (lambda v: v.update(downsample_padding=0), "'downsample_padding' .* is 0: expected 1"),
        (renamed, "'act_fn' .* is 'silu': expected 'relu'"),
        (
            lambda v: v["quantization_config"].pop("architecture"),
            "tensors and layers of the checkpoint have the SHA-256",
        ),
    ],
    ids=["act_fn", "norm_eps", "freq_shift", "flip", "padding", "renamed", "removed"],
)
def test_a_changed_architecture_is_named(folder, tmp_path, change, sentence):
    model = edited(folder, tmp_path / "unet", change)
    with pytest.raises(StepQuantError, match=sentence):
        UNet2DModel.from_pretrained(model)


def test_keys_that_no_result_depends_on_may_change(folder, tmp_path):
    def change(values):
        values.update(_diffusers_version="0.1", _name_or_path="elsewhere", of_a_newer_release=3)

    loaded = UNet2DModel.from_pretrained(edited(folder, tmp_path / "unet", change))
    known = UNet2DModel.from_pretrained(folder, subfolder="unet")
    assert all(map(torch.equal, outputs(loaded), outputs(known)))


def test_keys_that_the_library_has_given_up_are_left_out():
    model = packed_pipeline().unet
    recorded = {**architecture_of(model), "of_an_older_release": True}
    check_architecture(model, recorded)
    check_architecture(model, None)
    check_architecture(torch.nn.Linear(1, 1), recorded)


def test_more_steps_than_the_file_has_are_refused_before_they_take_memory(folder, tmp_path):
    def change(values):
        values["quantization_config"]["steps"] = 50_000_000
        values["quantization_config"]["layer_default"]["steps"] = 50_000_000

    model = edited(folder, tmp_path / "unet", change)
    sentence = rf"'step_grid' has shape \({STEPS},\): expected \(50000000,\), the steps of"
    with pytest.raises(StepQuantError, match=sentence):
        UNet2DModel.from_pretrained(model)


def test_a_shard_with_a_tensor_that_the_index_lacks_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    model = load_pipeline(folder)
    model.unet.save_pretrained(tmp_path / "unet", max_shard_size="20KB")
    shard = min((tmp_path / "unet").glob("*.safetensors"))
    save_file({**load_file(shard), "more.weight": torch.ones(1)}, shard, {"format": "pt"})
    with pytest.raises(StepQuantError, match=r"the unexpected tensor 'more\.weight'"):
        UNet2DModel.from_pretrained(tmp_path / "unet")
