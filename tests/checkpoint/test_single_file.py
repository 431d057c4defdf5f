"""Single-file checkpoints: the original layout of Stable Diffusion, written by the test."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES, build
from quantize_runs import refused
from single_files import save_as_one_file, state_dicts
from stepquant.api import load, quantize, sample
from stepquant.checkpoint.load import load_pipeline
from stepquant.models.mapped import Mapped

STEPS = 2
PROMPTS = ARCHITECTURES["sd"].arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model.safetensors`, `config` without weights, and `whole`, the diffusers folder."""
    folder = tmp_path_factory.mktemp("single")
    pipeline = build("sd")
    save_as_one_file(pipeline, folder / "model.safetensors")
    pipeline.save_pretrained(folder / "whole")
    shutil.copytree(folder / "whole", folder / "config")
    for file in (folder / "config").rglob("*.safetensors"):
        file.unlink()
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def refusal(file, config):
    return refused(lambda: load_pipeline(file, config=config))


def test_every_tensor_is_that_of_the_pipeline(folder):
    loaded = load(folder / "model.safetensors", config=folder / "config")
    assert type(loaded).__name__ == "StableDiffusionPipeline"
    for name, wanted in state_dicts(build("sd")).items():
        found = getattr(loaded, name).state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


def test_it_draws_the_same_images_and_packs_to_the_same_ones(folder):
    one, many = folder / "model.safetensors", folder / "whole"
    draw = {"num": 2, "steps": STEPS, **PROMPTS}
    opened = load(one, config=folder / "config")
    assert torch.equal(sample(opened, **draw), sample(many, **draw))
    few = {"settings": {"calibration.trajectories": 2}, "steps": STEPS, **PROMPTS}
    packed = [quantize(model, "minmax", 8, 8, **few).pipeline for model in (opened, many)]
    assert torch.equal(*(sample(pipeline, **draw) for pipeline in packed))


def test_a_large_model_in_one_file_is_loaded_not_mapped(folder, monkeypatch):
    monkeypatch.setattr("stepquant.pipelines.opening.MAP_FROM", 0)
    opened = load(folder / "model.safetensors", config=folder / "config", map_large=True)
    assert not any(isinstance(module, Mapped) for module in opened.unet.modules())
    assert any(isinstance(m, Mapped) for m in load(folder / "whole", map_large=True).unet.modules())


def test_a_half_precision_file_is_opened_in_float32(copy):
    file = copy / "model.safetensors"
    save_file({key: value.half() for key, value in load_file(file).items()}, file)
    assert load(file, config=copy / "config").unet.dtype == torch.float32


def test_without_a_network_the_sentence_says_what_to_pass(copy, monkeypatch):
    """The hub is not asked in a test: this is what its client raises when it is offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = copy / "model.safetensors"
    tensors = load_file(file)
    # The name by which diffusers knows the first version, of a block that the tiny model lacks.
    known = "model.diffusion_model.output_blocks.11.0.skip_connection.weight"
    save_file({**tensors, known: torch.zeros(1)}, file)
    message = refusal(file, None)
    assert "is taken for a model like 'stable-diffusion-v1-5/stable-diffusion-v1-5'" in message
    assert "could not be fetched" in message and "check the network, or pass the folder" in message
    message = refusal(file, "someone/sd")
    assert "the config of" in message and "is 'someone/sd', which is no local folder" in message
    assert "check the network" in message


def test_a_file_of_no_known_kind_is_not_taken_for_the_first_version(folder, tmp_path):
    message = refusal(folder / "model.safetensors", None)
    assert "which diffusers does not recognize" in message and "config" in message
    save_file({"lora.up": torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert "has tensor names like 'lora.up'" in refusal(tmp_path / "lora.safetensors", None)


def without(file, beginning):
    """`file` without the tensors whose names begin so."""
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if not k.startswith(beginning)}, file)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("model.diffusion_model.middle_block.0.", "it lacks tensors of one of its parts"),
        ("first_stage_model.", "Failed to load AutoencoderKL"),
        ("cond_stage_model.", "Failed to load CLIPTextModel"),
    ],
)
def test_what_the_file_lacks_is_told(copy, gone, words):
    without(copy / "model.safetensors", gone)
    message = refusal(copy / "model.safetensors", copy / "config")
    assert "as the StableDiffusionPipeline of the config" in message and words in message


def test_a_part_that_the_file_lacks_does_not_come_from_the_config_s_weights(copy):
    without(copy / "model.safetensors", "first_stage_model.")
    message = refusal(copy / "model.safetensors", copy / "whole")
    assert "Failed to load AutoencoderKL" in message


def test_a_config_of_another_kind_is_told(folder, tmp_path):
    build("sdxl").save_pretrained(tmp_path / "sdxl")
    build("dit").save_pretrained(tmp_path / "dit")
    file = folder / "model.safetensors"
    assert "as the StableDiffusionXLPipeline of the config" in refusal(file, tmp_path / "sdxl")
    message = refusal(file, tmp_path / "dit")
    assert "is of DiTPipeline, which diffusers does not load from single files" in message


def test_configs_that_are_none_are_told(folder, tmp_path):
    file = folder / "model.safetensors"
    assert "holds no model_index.json" in refusal(file, tmp_path)
    assert "is 'no such/thing/at all', which is no local" in refusal(file, "no such/thing/at all")


def test_pickles_are_refused_in_the_file_and_beside_the_config(copy):
    (copy / "model.ckpt").write_bytes(b"anything")
    assert "model.ckpt' is a pickle" in refusal(copy / "model.ckpt", copy / "config")
    (copy / "config" / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"anything")
    message = refusal(copy / "model.safetensors", copy / "config")
    assert "holds its weights only as a pickle" in message


def test_a_cut_file_is_told(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert "is not a whole safetensors file" in refusal(file, copy / "config")


def test_a_config_for_a_folder_or_an_open_pipeline_is_refused(folder):
    whole, config = folder / "whole", folder / "config"
    assert "which is not a single safetensors file" in refusal(whole, config)
    message = refused(lambda: load(build("sd"), config=config))
    assert "was given for an open StableDiffusionPipeline" in message
