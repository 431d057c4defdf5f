"""The bypass of the input layer's errors: what is saved is what is loaded."""

import hashlib
import json

import pytest
import torch
from accelerate import cpu_offload
from diffusers import UNet2DModel
from safetensors.torch import load_file

from packed_models import STATIC, STEPS, WEIGHTS, outputs, packed_pipeline, tampered, unet
from stepquant.api import inspect
from stepquant.checkpoint.load import load_pipeline
from stepquant.checkpoint.save import save_pipeline
from stepquant.models.input_bypass import SLOPES_NAME, bypass_of
from stepquant.support.errors import StepQuantError
from stepquant.verbs.quantize import quantize


@pytest.fixture(scope="module")
def pipeline():
    return packed_pipeline(bypass=True)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    return save_pipeline(pipeline, "unet", tmp_path_factory.mktemp("saved") / "pipeline")


def test_a_loaded_model_gives_equal_bits(pipeline, folder):
    loaded = load_pipeline(folder).unet
    assert bypass_of(loaded).layer == STATIC
    saved, plain = outputs(pipeline.unet), outputs(packed_pipeline().unet)
    for a, b, without in zip(saved, outputs(loaded), plain, strict=True):
        assert torch.equal(a, b)
        assert not torch.allclose(a, without, atol=1e-3)


def test_saving_a_loaded_pipeline_writes_equal_bytes(folder, tmp_path):
    again = save_pipeline(load_pipeline(folder), "unet", tmp_path / "again")
    for file in ("config.json", WEIGHTS):
        assert (again / "unet" / file).read_bytes() == (folder / "unet" / file).read_bytes()


@torch.no_grad()
def test_a_bf16_model_keeps_the_slopes(folder, pipeline):
    model = UNet2DModel.from_pretrained(folder, subfolder="unet", dtype=torch.bfloat16)
    assert torch.equal(getattr(model, SLOPES_NAME), torch.linspace(1, 20, STEPS))
    x, timestep = torch.randn(2, 1, 8, 8).to(torch.bfloat16), torch.tensor([0, 900])
    low, full = model(x, timestep).sample, pipeline.unet(x.float(), timestep).sample
    assert low.dtype == torch.bfloat16
    assert (low - full).abs().max() < 0.1 * full.abs().max()


def test_a_dequantized_model_has_no_bypass(folder, tmp_path):
    model = load_pipeline(folder).unet.dequantize()
    assert model.state_dict().keys() == unet().state_dict().keys()
    assert bypass_of(model) is None
    plain = load_pipeline(save_pipeline(packed_pipeline(), "unet", tmp_path / "plain")).unet
    for a, b in zip(outputs(plain.dequantize()), outputs(model), strict=True):
        assert torch.equal(a, b)


def test_a_compiled_model_gives_the_same(folder):
    model = load_pipeline(folder).unet
    expected = outputs(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for a, b in zip(outputs(compiled), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_file_is_what_the_format_document_says(folder):
    config = json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]
    assert config["input_error_bypass"] == STATIC
    tensors = load_file(folder / "unet" / WEIGHTS)
    assert tensors[SLOPES_NAME].dtype == torch.float32
    assert tensors[SLOPES_NAME].shape == (STEPS,)
    stored = bytes(tensors.pop("stepquant_sha256").tolist())
    default = config["layer_default"]
    entries = {name: {**default, **layer} for name, layer in config["layers"].items()}
    entries["/input_error_bypass"] = config["input_error_bypass"]
    text = json.dumps(entries, sort_keys=True, separators=(",", ":")) + "\n"
    for name, tensor in sorted(tensors.items()):
        digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        text += f"{name} {str(tensor.dtype).removeprefix('torch.')} {digest}\n"
    assert hashlib.sha256(text.encode()).digest() == stored
    plain = packed_pipeline().unet.config["quantization_config"].to_dict()
    assert "input_error_bypass" not in plain


def test_inspect_shows_it(folder):
    slopes = torch.linspace(1, 20, STEPS).tolist()
    assert inspect(folder)["input_error_bypass"] == {"layer": STATIC, "slopes": slopes}


def test_a_model_that_was_cast_is_not_saved(tmp_path):
    pipeline = packed_pipeline(bypass=True)
    pipeline.unet.register_buffer(SLOPES_NAME, torch.ones(STEPS, dtype=torch.bfloat16))
    with pytest.raises(StepQuantError, match=f"'{SLOPES_NAME}' of the model has dtype"):
        save_pipeline(pipeline, "unet", tmp_path / "out")


def replaced(value):
    return lambda tensors, config: tensors.update({SLOPES_NAME: value})


CASES = {
    "a layer that is not packed": (
        lambda tensors, config: config.update(input_error_bypass="conv_norm_out"),
        "input_error_bypass of the quantization config is 'conv_norm_out': expected the name",
    ),
    "no name": (
        lambda tensors, config: config.update(input_error_bypass=True),
        "input_error_bypass of the quantization config is True: expected the name",
    ),
    "a list": (
        lambda tensors, config: config.update(input_error_bypass=["conv_in"]),
        r"input_error_bypass of the quantization config is \['conv_in'\]: expected the name",
    ),
    "another layer": (
        lambda tensors, config: config.update(input_error_bypass="conv_out"),
        "tensors and layers of the checkpoint have the SHA-256",
    ),
    "slopes without a layer": (
        lambda tensors, config: config.pop("input_error_bypass"),
        f"holds the unexpected tensor '{SLOPES_NAME}'",
    ),
    "no slopes": (
        lambda tensors, config: tensors.pop(SLOPES_NAME),
        f"lacks the tensor '{SLOPES_NAME}'",
    ),
    "other number of steps": (
        replaced(torch.ones(3)),
        rf"tensor '{SLOPES_NAME}' has shape \(3,\): expected \({STEPS},\)",
    ),
    "another dtype": (
        replaced(torch.ones(STEPS, dtype=torch.float16)),
        f"tensor '{SLOPES_NAME}' has dtype torch.float16: expected torch.float32",
    ),
    "infinite": (
        replaced(torch.full((STEPS,), torch.inf)),
        f"tensor '{SLOPES_NAME}' holds NaN or infinity: expected finite numbers",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_told(folder, tmp_path, case):
    change, sentence = CASES[case]
    broken = tampered(folder / "unet", tmp_path / "unet", change)
    with pytest.raises(StepQuantError, match=sentence):
        UNet2DModel.from_pretrained(broken)


@torch.no_grad()
def test_weights_that_are_fetched_for_each_layer_change_nothing():
    """As sequential offload does it, with the buffers of a model that has parameters of its own."""
    model = packed_pipeline(bypass=True).unet
    expected = outputs(model)
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    for a, b in zip(outputs(model), expected, strict=True):
        assert torch.equal(a, b)


def test_a_dequantized_model_is_quantized_anew_with_one_bypass(folder, tmp_path):
    settings = {
        "calibration.trajectories": 2,
        "calibration.steps": 2,
        "input_error_bypass.samples_per_step": 1,
        "bias_correction.samples_per_step": 1,
    }
    pipeline = load_pipeline(folder)
    pipeline.unet = pipeline.unet.dequantize()
    again = quantize(pipeline, "training-free", 8, 8, tmp_path / "out", settings=settings)
    loaded = load_pipeline(tmp_path / "out").unet
    for a, b in zip(outputs(again.pipeline.unet), outputs(loaded), strict=True):
        assert torch.equal(a, b)
