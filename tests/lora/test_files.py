"""What a LoRA is read from, and what is refused before a model is looked at."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from quantize_runs import refused
from stepquant.lora.files import read_lora_file

PAIR = {"unet.conv_in.lora_A.weight": torch.ones(2, 4), "unet.conv_in.lora_B.weight": torch.eye(2)}
USUAL = "pytorch_lora_weights.safetensors"


def same(file, tensors):
    return file.tensors.keys() == tensors.keys() and all(
        torch.equal(file.tensors[key], tensor) for key, tensor in tensors.items()
    )


def test_a_file_a_folder_and_tensors_give_the_same(tmp_path):
    save_file(PAIR, tmp_path / "style.safetensors")
    for source in (tmp_path / "style.safetensors", str(tmp_path), dict(PAIR)):
        file = read_lora_file(source)
        assert same(file, PAIR) and file.configs == {}


def test_of_several_files_the_usual_name_or_the_one_asked_for(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({**PAIR, name: torch.zeros(1)}, tmp_path / name)
    message = refused(lambda: read_lora_file(tmp_path))
    assert "a.safetensors, b.safetensors" in message and "weight_name" in message
    assert "b.safetensors" in read_lora_file(tmp_path, "b.safetensors").tensors
    save_file(PAIR, tmp_path / USUAL)
    assert same(read_lora_file(tmp_path), PAIR)


def test_the_settings_of_peft_beside_the_file_and_in_its_header(tmp_path):
    save_file(PAIR, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 2}))
    assert read_lora_file(tmp_path).configs == {"": {"lora_alpha": 8, "r": 2}}
    header = {"unet.lora_alpha": 4, "unet.alpha_pattern": {"conv_in": 1}, "text_encoder.r": 2}
    path = tmp_path / "styled.safetensors"
    save_file(PAIR, path, {"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    assert read_lora_file(path).configs == {
        "unet": {"lora_alpha": 4, "alpha_pattern": {"conv_in": 1}},
        "text_encoder": {"r": 2},
    }
    bare = {"lora_alpha": 4, "r": 2}  # from `save_lora_adapter`, of one model
    save_file(PAIR, path, {"format": "pt", "lora_adapter_metadata": json.dumps(bare)})
    assert read_lora_file(path).configs == {"": bare}


def test_settings_that_are_no_json_are_told(tmp_path):
    save_file(PAIR, tmp_path / USUAL)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "adapter_config.json' is not readable as JSON" in refused(
        lambda: read_lora_file(tmp_path)
    )


def test_what_is_not_there(tmp_path, monkeypatch):
    assert "no safetensors file" in refused(lambda: read_lora_file(tmp_path))
    for source in (tmp_path / "x.safetensors", "style"):
        assert "does not exist: expected a safetensors file" in refused(
            lambda source=source: read_lora_file(source)
        )

    def offline(repository, name):
        raise OSError("no network")

    monkeypatch.setattr("stepquant.lora.files.hf_hub_download", offline)
    message = refused(lambda: read_lora_file("someone/style"))
    assert "'someone/style' is not a local file" in message and USUAL in message


def test_of_the_hub_the_usual_file_or_the_one_asked_for(tmp_path, monkeypatch):
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        save_file(PAIR, tmp_path / name)
        return str(tmp_path / name)

    monkeypatch.setattr("stepquant.lora.files.hf_hub_download", download)
    assert same(read_lora_file("someone/style"), PAIR)
    assert same(read_lora_file("someone/style", "other.safetensors"), PAIR)
    assert asked == [("someone/style", USUAL), ("someone/style", "other.safetensors")]


def test_pickles_and_damaged_files_are_refused(tmp_path):
    torch.save(PAIR, tmp_path / "style.bin")
    assert "is a pickle" in refused(lambda: read_lora_file(tmp_path / "style.bin"))
    save_file(PAIR, tmp_path / USUAL)
    (tmp_path / USUAL).write_bytes((tmp_path / USUAL).read_bytes()[:-4])
    assert "is not a whole safetensors file" in refused(lambda: read_lora_file(tmp_path))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no tensor"),
        ({"a.lora_A.weight": torch.ones(2, dtype=torch.int32)}, "torch.int32 under 'a.lora_A"),
        ({"a.lora_A.weight": 3.0}, "float under 'a.lora_A.weight'"),
        ({"a.lora_A.weight": torch.tensor([torch.nan])}, "not finite in 'a.lora_A.weight'"),
        ({"a.dora_scale": torch.ones(1)}, "the key 'a.dora_scale', so it is DoRA"),
        ({"a.lora_magnitude_vector": torch.ones(1)}, "so it is DoRA"),
        ({"a.lokr_w1": torch.ones(1)}, "so it is LoKr"),
        ({"a.hada_w1_a": torch.ones(1)}, "so it is LoHa"),
    ],
)
def test_what_is_no_plain_lora_is_named(tensors, words):
    assert words in refused(lambda: read_lora_file(tensors))


def test_an_alpha_may_be_a_whole_number():
    assert read_lora_file({"a.alpha": torch.tensor(4)}).tensors["a.alpha"] == 4.0
