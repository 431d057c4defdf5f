"""LoRA files with values that nobody's trainer writes: a sentence, or the LoRA as it is meant."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import save_file

from architectures import build
from lora_files import kohya, matrices
from quantize_runs import refused
from stepquant.lora.files import LoraFile, read_lora_file
from stepquant.lora.keys import lora_layers

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def sd():
    return build("sd")


@pytest.fixture
def tensors(sd):
    return matrices(sd.unet, [LAYER])


def factor(sd, tensors, config):
    found = lora_layers(LoraFile("the LoRA", tensors, {"": config}), sd, "unet")
    return found["unet", LAYER][1].factor


@pytest.mark.parametrize("alpha", [None, "8", True, [8], {}, float("inf"), float("nan"), 10**400])
def test_an_alpha_that_is_no_number_is_named(sd, tensors, alpha):
    message = refused(lambda: factor(sd, tensors, {"lora_alpha": alpha}))
    assert message.startswith("the LoRA has the setting lora_alpha=")
    message = refused(
        lambda: factor(sd, tensors, {"lora_alpha": 1, "alpha_pattern": {"to_q": alpha}})
    )
    assert "has the setting alpha_pattern['to_q']=" in message


@pytest.mark.parametrize("patterns", [3, "to_q", ["to_q"]])
def test_patterns_that_are_none_are_named(sd, tensors, patterns):
    config = {"lora_alpha": 1, "alpha_pattern": patterns}
    assert "has the setting alpha_pattern=" in refused(lambda: factor(sd, tensors, config))


@pytest.mark.parametrize("pattern", ["[", "(a+)+$", "a*b*c*d*", "x" * 600, "\\"])
def test_patterns_that_would_take_forever_or_are_no_patterns_are_named(sd, tensors, pattern):
    started = time.monotonic()
    config = {"lora_alpha": 1, "alpha_pattern": {pattern: 2}}
    assert "has the alpha_pattern '" in refused(lambda: factor(sd, tensors, config))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("pattern", ["to_q", "attn1.to_q", r".*\.to_q", r"attn[12]\.to_q"])
def test_patterns_of_layer_names_count(sd, tensors, pattern):
    config = {"lora_alpha": 1, "alpha_pattern": {pattern: 6}}
    assert factor(sd, tensors, config) == pytest.approx(2)


@pytest.mark.parametrize("text", ["[1]", "3", '"a"', "null"])
def test_settings_that_are_no_object_are_named(tensors, tmp_path, text):
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    message = refused(lambda: read_lora_file(tmp_path))
    assert "adapter_config.json' holds a" in message and "expected the settings" in message
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": text})
    assert f"the header of '{path}' holds a" in refused(lambda: read_lora_file(path))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_what_they_stand_for(sd, tensors, dtype):
    few = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    found = lora_layers(read_lora_file(few), sd, "unet")["unet", LAYER][1]
    assert torch.equal(found.A.float(), few[f"{LAYER}.lora_A.weight"].float())
    few[f"{LAYER}.lora_A.weight"] = (tensors[f"{LAYER}.lora_A.weight"] * torch.nan).to(dtype)
    assert "numbers that are not finite" in refused(lambda: read_lora_file(few))


def test_alphas_of_kohya_that_are_no_numbers_are_refused(sd, tensors):
    wide = kohya(tensors, "lora_unet_", torch.ones(2))
    assert "cannot be read for StableDiffusionPipeline" in refused(
        lambda: lora_layers(read_lora_file(wide), sd, "unet")
    )


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "lora.safetensors").write_bytes(b"")

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("stepquant.support.safetensors_file.safe_open", forbidden)
    message = refused(lambda: read_lora_file(tmp_path / "lora.safetensors"))
    assert "cannot be read (Permission denied)" in message and "damaged" not in message
