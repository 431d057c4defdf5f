"""Folders and hub ids that cannot be loaded are told in one sentence."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from packed_models import WEIGHTS, outputs, packed_pipeline, unet
from stepquant.checkpoint.load import load_pipeline
from stepquant.checkpoint.save import save_pipeline
from stepquant.support.errors import StepQuantError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pipeline = packed_pipeline()
    return save_pipeline(pipeline, "unet", tmp_path_factory.mktemp("saved") / "pipeline")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def refused(source, sentence):
    with pytest.raises(StepQuantError, match=sentence) as caught:
        load_pipeline(source)
    assert "\n" not in str(caught.value)


def test_float_pipeline_loads(folder, tmp_path):
    model = unet()
    DDPMPipeline(model, packed_pipeline().scheduler).save_pretrained(tmp_path / "float")
    loaded = load_pipeline(tmp_path / "float").unet
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(loaded), strict=True))


def test_dtype_is_that_of_the_float_parts(folder):
    assert load_pipeline(folder, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_text_path_loads(folder):
    assert isinstance(load_pipeline(str(folder)), DDPMPipeline)


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_truncated_weights_are_refused(copy, keep):
    path = copy / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    refused(copy, f"'.*{WEIGHTS}' is not a whole safetensors file .*cut short or damaged")


@pytest.mark.parametrize("position", [0, 9, 40])
def test_damaged_header_is_refused(copy, position):
    path = copy / "unet" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[position : position + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    refused(copy, f"'.*{WEIGHTS}' is not a whole safetensors file")


def test_truncated_weights_are_an_error_in_diffusers_itself(copy):
    path = copy / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(OSError, match="Unable to load weights"):
        DDPMPipeline.from_pretrained(copy)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "weights.pkl"])
def test_pickled_weights_are_refused(copy, name):
    (copy / "unet" / WEIGHTS).rename(copy / "unet" / name)
    refused(copy, f"'.*unet' holds its weights only as a pickle .'{name}'.: pickle files are")


def test_pickle_beside_safetensors_is_ignored(copy):
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not read")
    load_pipeline(copy)


def test_absent_weights_are_refused(copy):
    (copy / "unet" / WEIGHTS).unlink()
    refused(copy, "cannot be loaded .*no file named diffusion_pytorch_model.safetensors")


def test_absent_component_is_refused(copy):
    shutil.rmtree(copy / "unet")
    refused(copy, "has no folder 'unet': expected the UNet2DModel")


def test_unreadable_index_is_refused(copy):
    (copy / "model_index.json").write_text('{"_class_name": ')
    refused(copy, "model_index.json' is not readable as JSON")


def test_index_without_a_class_is_refused(copy):
    (copy / "model_index.json").write_text("{}")
    refused(copy, "model_index.json' names no pipeline class")


def test_unknown_pipeline_class_is_refused(copy):
    index = (copy / "model_index.json").read_text().replace("DDPMPipeline", "NoSuchPipeline")
    (copy / "model_index.json").write_text(index)
    refused(copy, r"model_index\.json' has the SHA-256 .*: expected .*one of the two is damaged")
    (copy / "stepquant_sha256.json").unlink()
    refused(copy, "is of the pipeline class 'NoSuchPipeline', which the installed diffusers does")


def test_unreadable_config_is_refused(copy):
    (copy / "unet" / "config.json").write_text("{")
    refused(copy, r"config\.json' is not readable as JSON .*: expected the config of 'unet'")


def test_component_folder_is_refused(copy):
    refused(copy / "unet", "holds no model_index.json: .*so pass the folder above it")


def test_empty_folder_is_refused(tmp_path):
    refused(tmp_path, "holds no model_index.json: expected a diffusers pipeline folder")


def test_absent_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "the folder '.*nowhere' does not exist")
    refused("./nowhere", "the folder './nowhere' does not exist")


def test_file_is_refused(copy):
    refused(copy / "model_index.json", "is a file: expected a diffusers pipeline folder")


def hub_that_raises(monkeypatch, error, cause):
    def download(*args, **kwargs):
        raise error from cause

    monkeypatch.setattr(DiffusionPipeline, "download", download)


def test_unreachable_hub_is_told(monkeypatch):
    hub_that_raises(monkeypatch, OSError("Cannot load model"), OfflineModeIsEnabled("offline"))
    refused("org/name", "'org/name' is not a local folder, and the hub could not be reached")


def test_unknown_hub_id_is_told(monkeypatch):
    missing = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    hub_that_raises(monkeypatch, OSError("Cannot load model"), missing)
    refused("org/name", "'org/name' is neither a local folder nor a model that the hub shows")


def test_other_hub_errors_are_told(monkeypatch):
    hub_that_raises(monkeypatch, OSError("Could not find the safetensors.\nMore."), None)
    refused("org/name", r"could not be fetched from the hub \(Could not find the safetensors\)")


def test_hub_model_is_checked_like_a_folder(copy, monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *args, **kwargs: str(copy))
    assert isinstance(load_pipeline("org/name"), DDPMPipeline)
    (copy / "unet" / WEIGHTS).write_bytes(b"short")
    refused("org/name", "is not a whole safetensors file")


def test_a_float_model_that_lacks_a_tensor_is_refused(copy):
    pipeline = copy.parent / "float"
    DDPMPipeline(unet(), DDIMScheduler()).save_pretrained(pipeline)
    file = pipeline / "unet" / WEIGHTS
    tensors = load_file(file)
    del tensors["conv_in.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(StepQuantError, match=r"no tensor 'conv_in.weight' in the files of 'unet'"):
        load_pipeline(pipeline)


def test_a_text_pipeline_without_transformers_says_what_to_install(copy, monkeypatch):
    index = copy / "model_index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps({**values, "tokenizer": ["transformers", "CLIPTokenizer"]}))
    monkeypatch.setattr("stepquant.checkpoint.folder.find_spec", lambda name: None)
    refused(copy, r"has the CLIPTokenizer 'tokenizer' of the package .*'stepquant\[text\]'")


@pytest.mark.parametrize(
    "name", ["~no-such-user/x", "n" * 300, "a\0b"], ids=["user", "long", "null"]
)
def test_a_path_that_the_system_does_not_take_is_named(name):
    refused(name, "begins with the home folder|cannot be looked at")
