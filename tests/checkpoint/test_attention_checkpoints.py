"""Packed attention products: what is saved is what is loaded, and what is wrong is told."""

import copy
import hashlib
import json

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from safetensors.torch import load_file

from packed_models import (
    ATTENTION,
    STATIC_ATTENTION,
    STEPS,
    WEIGHTS,
    outputs,
    packed_pipeline,
    tampered,
    unet,
)
from stepquant.checkpoint.attention_config import AttentionConfig
from stepquant.checkpoint.config import StepQuantConfig
from stepquant.checkpoint.load import load_pipeline
from stepquant.checkpoint.save import describe_attention, save_pipeline
from stepquant.checkpoint.validate import packed_attention
from stepquant.support.errors import StepQuantError

NAME = ATTENTION[0]
TENSORS = f"{NAME}.processor.products"


@pytest.fixture(scope="module")
def pipeline():
    return packed_pipeline(attention=True)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    return save_pipeline(pipeline, "unet", tmp_path_factory.mktemp("saved") / "pipeline")


def test_a_loaded_model_gives_equal_bits(pipeline, folder):
    loaded = load_pipeline(folder).unet
    for a, b in zip(outputs(pipeline.unet), outputs(loaded), strict=True):
        assert torch.equal(a, b)
    plain = packed_pipeline().unet
    assert not torch.allclose(outputs(plain)[0], outputs(loaded)[0], rtol=1e-4, atol=1e-4)
    assert describe_attention(loaded) == describe_attention(pipeline.unet)
    assert describe_attention(loaded)[NAME] == AttentionConfig(8, 3, STEPS)
    assert describe_attention(loaded)[STATIC_ATTENTION] == AttentionConfig(7, 4, 1)


def test_saving_a_loaded_pipeline_writes_equal_bytes(folder, tmp_path):
    again = save_pipeline(load_pipeline(folder), "unet", tmp_path / "again")
    for file in ("config.json", WEIGHTS):
        assert (again / "unet" / file).read_bytes() == (folder / "unet" / file).read_bytes()


def test_a_bf16_model_keeps_the_tables_and_nearly_the_outputs(folder, pipeline):
    model = UNet2DModel.from_pretrained(folder, subfolder="unet", dtype=torch.bfloat16)
    tables = packed_attention(pipeline.unet)
    assert packed_attention(model).keys() == tables.keys()
    for name, products in packed_attention(model).items():
        for key, tensor in products.state_dict().items():
            assert torch.equal(tensor, tables[name].state_dict()[key]), f"{name}.{key}"
            assert tensor.dtype in (torch.float32, torch.uint8)
    for low, full in zip(outputs(model, torch.bfloat16), outputs(pipeline.unet), strict=True):
        assert low.dtype == torch.bfloat16
        assert (low - full).abs().max() < 0.1 * full.abs().max()


def test_a_copy_reads_its_own_timestep(pipeline):
    before = outputs(pipeline.unet)
    other = copy.deepcopy(pipeline.unet)
    assert torch.equal(outputs(other)[1], before[1])
    outputs(other)
    assert torch.equal(outputs(pipeline.unet)[0], before[0])


def test_a_dequantized_model_has_plain_processors(folder):
    model = load_pipeline(folder).unet.dequantize()
    assert not packed_attention(model)
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            assert type(module.processor) is AttnProcessor2_0, name
    assert model.state_dict().keys() == unet().state_dict().keys()
    packed = outputs(load_pipeline(folder).unet)
    for a, b in zip(packed, outputs(model), strict=True):
        assert (a - b).abs().max() < 0.2 * b.abs().max()


def test_the_file_is_what_the_format_document_says(folder):
    """Keys, dtypes, shapes and the checksum in docs/reference/checkpoint-format.md."""
    config = json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]
    assert config["attention"] == {
        ATTENTION[0]: {"bits": 8, "probability_bits": 3, "steps": STEPS},
        ATTENTION[1]: {"bits": 7, "probability_bits": 4, "steps": 1},
        ATTENTION[2]: {"bits": 6, "probability_bits": 5, "steps": STEPS},
    }
    tensors = load_file(folder / "unet" / WEIGHTS)
    for name, entry in config["attention"].items():
        rows, prefix = entry["steps"], f"{name}.processor.products."
        expected = {
            "act_scale": (torch.float32, (3, rows)),
            "act_zero_point": (torch.uint8, (3, rows)),
            "probability_scale": (torch.float32, (rows,)),
            "probability_log2": (torch.uint8, (rows,)),
        }
        found = {
            key.removeprefix(prefix): (tensor.dtype, tuple(tensor.shape))
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        assert found == expected
    stored = bytes(tensors.pop("stepquant_sha256").tolist())
    default = config["layer_default"]
    entries = {name: {**default, **layer} for name, layer in config["layers"].items()}
    entries |= config["attention"]
    entries["/architecture"] = config["architecture"]
    text = json.dumps(entries, sort_keys=True, separators=(",", ":")) + "\n"
    for name, tensor in sorted(tensors.items()):
        digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        text += f"{name} {str(tensor.dtype).removeprefix('torch.')} {digest}\n"
    assert hashlib.sha256(text.encode()).digest() == stored


def test_a_model_without_packed_products_has_no_such_key():
    config = packed_pipeline().unet.config["quantization_config"]
    assert "attention" not in (config if isinstance(config, dict) else config.to_dict())


def in_config(change):
    return lambda tensors, config: change(config["attention"])


def put(key, index, value):
    def change(tensors, config):
        tensors[f"{TENSORS}.{key}"][index] = value

    return change


CASES = {
    "unknown attention": (
        in_config(lambda entries: entries.update({"mid_block.attentions.7": entries[NAME]})),
        "names the layer 'mid_block.attentions.7', which UNet2DModel does not have",
    ),
    "a module that is no attention": (
        in_config(lambda entries: entries.update({"conv_norm_out": entries[NAME]})),
        "attention 'conv_norm_out' is attention of the class GroupNorm in the model: expected",
    ),
    "a packed layer": (
        in_config(lambda entries: entries.update({"conv_in": entries[NAME]})),
        "attention 'conv_in' is attention of the class Conv2d in the model: expected",
    ),
    "no object of attention": (
        lambda tensors, config: config.update(attention=[NAME]),
        "attention of the quantization config is .*: expected an object with one entry",
    ),
    "no object of an entry": (
        in_config(lambda entries: entries.update({NAME: 8})),
        f"attention '{NAME}' of the quantization config is 8: expected an object with bits,",
    ),
    "unknown key": (
        in_config(lambda entries: entries[NAME].update(groups=2)),
        f"attention '{NAME}' of the quantization config is .*: expected an object with bits,",
    ),
    "missing key": (
        in_config(lambda entries: entries[NAME].pop("steps")),
        f"attention '{NAME}' of the quantization config is .*: expected an object with bits,",
    ),
    "bits out of range": (
        in_config(lambda entries: entries[NAME].update(bits=9)),
        f"bits of attention '{NAME}' in the quantization config is 9: expected a whole number",
    ),
    "bits as text": (
        in_config(lambda entries: entries[NAME].update(probability_bits="3")),
        f"probability_bits of attention '{NAME}' in the quantization config is '3': expected",
    ),
    "other number of steps": (
        in_config(lambda entries: entries[NAME].update(steps=3)),
        f"steps of attention '{NAME}' in the quantization config is 3: expected {STEPS}",
    ),
    "no steps": (
        in_config(lambda entries: entries[NAME].update(steps=0)),
        f"steps of attention '{NAME}' in the quantization config is 0: expected a whole number",
    ),
    "static in the config alone": (
        in_config(lambda entries: entries[NAME].update(steps=1)),
        rf"act_scale' has shape \(3, {STEPS}\): expected \(3, 1\), for tables of 1 rows",
    ),
    "fewer bits than its zero points": (
        in_config(lambda entries: entries[NAME].update(bits=5)),
        r"act_zero_point' holds 128 at \[0, 0\]: expected at most 31, the largest code of 5 bits",
    ),
    "changed bits of probabilities": (
        in_config(lambda entries: entries[NAME].update(probability_bits=4)),
        "tensors and layers of the checkpoint have the SHA-256",
    ),
    "attention left out of the config": (
        in_config(lambda entries: entries.pop(NAME)),
        f"holds the unexpected tensor '{TENSORS}.act_scale' and 3 more",
    ),
    "missing tensor": (
        lambda tensors, config: tensors.pop(f"{TENSORS}.probability_log2"),
        f"lacks the tensor '{TENSORS}.probability_log2'",
    ),
    "infinite scale": (
        put("act_scale", (2, 1), float("inf")),
        rf"'{TENSORS}.act_scale' holds inf at \[2, 1\]: expected finite positive scales",
    ),
    "scale of probabilities not a number": (
        put("probability_scale", 4, float("nan")),
        rf"'{TENSORS}.probability_scale' holds nan at \[4\]: expected finite positive scales",
    ),
    "scale of probabilities without an inverse": (
        put("probability_scale", 0, 1e-45),
        rf"'{TENSORS}.probability_scale' holds 1.4\S+ at \[0\]",
    ),
    "neither uniform nor log2": (
        put("probability_log2", 1, 2),
        rf"'{TENSORS}.probability_log2' holds 2 at \[1\]: expected 0 for the uniform grid or 1",
    ),
    "another grid": (
        put("probability_log2", 1, 1),
        "tensors and layers of the checkpoint have the SHA-256",
    ),
    "wrong dtype": (
        lambda tensors, config: tensors.update(
            {f"{TENSORS}.act_scale": tensors[f"{TENSORS}.act_scale"].half()}
        ),
        f"'{TENSORS}.act_scale' has dtype torch.float16: expected torch.float32",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), CASES.values(), ids=CASES)
def test_a_bad_value_is_refused_by_one_sentence(folder, tmp_path, change, sentence):
    bad = tampered(folder / "unet", tmp_path / "unet", change)
    with pytest.raises(StepQuantError, match=sentence) as error:
        UNet2DModel.from_pretrained(bad)
    assert "\n" not in str(error.value)


def test_a_config_says_what_it_was_made_of():
    entry = {"bits": 8, "probability_bits": 3, "steps": 5}
    config = StepQuantConfig(steps=5, attention={"b": entry, "a": AttentionConfig(4, 8, 1)})
    assert list(config.to_dict()["attention"]) == ["a", "b"]
    assert config.to_dict()["attention"]["b"] == entry
    assert StepQuantConfig.from_dict(config.to_dict()) == config
