"""The same LoRA under the names of several trainers, for the layers of small pipelines."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from architectures import build
from lora_files import ALPHA, RANK, kohya, matrices, of, processors
from quantize_runs import refused
from stepquant.lora.files import LoraFile, read_lora_file
from stepquant.lora.keys import lora_layers

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
ATTENTION = [f"{BLOCK}.attn1.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
OTHERS = [
    f"{BLOCK}.ff.net.0.proj",
    "down_blocks.0.attentions.0.proj_in",
    "mid_block.resnets.0.conv1",
]
TEXT = [
    f"encoder.layers.1.{part}" for part in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
]


@pytest.fixture(scope="module")
def sd():
    return build("sd")


@pytest.fixture(scope="module")
def unet_tensors(sd):
    return matrices(sd.unet, ATTENTION + OTHERS)


@pytest.fixture(scope="module")
def text_tensors(sd):
    return matrices(sd.text_encoder, TEXT)


def check(found, component, tensors, factor):
    """Exactly the layers of `tensors`, with its matrices and the factor."""
    layers = {key.partition(".lora_")[0] for key in tensors}
    assert {name for part, name in found if part == component} == layers
    for name in layers:
        weights = found[component, name][1]
        assert torch.equal(weights.A, tensors[f"{name}.lora_A.weight"])
        assert torch.equal(weights.B, tensors[f"{name}.lora_B.weight"])
        assert weights.factor == pytest.approx(factor)


def read(tensors, pipeline, denoiser="unet"):
    return lora_layers(read_lora_file(tensors), pipeline, denoiser)


def test_names_of_diffusers(sd, unet_tensors, text_tensors):
    found = read(of("unet", unet_tensors) | of("text_encoder", text_tensors), sd)
    check(found, "unet", unet_tensors, 1.0)
    check(found, "text_encoder", text_tensors, 1.0)


@pytest.mark.parametrize("alpha", [ALPHA, None])
def test_names_of_kohyas_trainer(sd, unet_tensors, text_tensors, alpha):
    value = None if alpha is None else torch.tensor(alpha)
    tensors = kohya(unet_tensors, "lora_unet_", value)
    tensors |= kohya(text_tensors, "lora_te_text_model_", value)
    found = read(tensors, sd)
    factor = 1.0 if alpha is None else ALPHA / RANK
    check(found, "unet", unet_tensors, factor)
    check(found, "text_encoder", text_tensors, factor)


def test_each_layer_has_its_own_alpha(sd, unet_tensors):
    tensors = kohya(unet_tensors, "lora_unet_", torch.tensor(ALPHA))
    tensors[f"lora_unet_{ATTENTION[1].replace('.', '_')}.alpha"] = torch.tensor(1.5)
    found = read(tensors, sd)
    factors = {name: weights.factor for (_, name), (_, weights) in found.items()}
    assert factors.pop(ATTENTION[1]) == 1.5 / RANK
    assert set(factors.values()) == {ALPHA / RANK}


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_names_of_old_attention_processors(sd, prefix):
    tensors = matrices(sd.unet, ATTENTION)
    named = {prefix + key: value for key, value in processors(tensors).items()}
    check(read(named, sd), "unet", tensors, 1.0)


def test_names_of_peft_with_and_without_the_adapters(sd, unet_tensors):
    for end in (".weight", ".default.weight"):
        named = {
            f"base_model.model.{key.removesuffix('.weight')}{end}": value
            for key, value in unet_tensors.items()
        }
        check(read(named, sd), "unet", unet_tensors, 1.0)


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux"])
def test_transformers(name):
    pipeline = build(name)
    layers = [n for n, m in pipeline.transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    tensors = matrices(pipeline.transformer, layers)
    check(read(of("transformer", tensors), pipeline, "transformer"), "transformer", tensors, 1.0)
    check(read(tensors, pipeline, "transformer"), "transformer", tensors, 1.0)


def test_every_layer_of_stable_diffusion_xl_and_both_text_encoders():
    pipeline, tensors = build("sdxl"), {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipeline, component)
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        layers = [n for n, m in model.named_modules() if isinstance(m, kinds) and "patch" not in n]
        tensors[component] = matrices(model, layers)
    named = {k: v for part, entry in tensors.items() for k, v in of(part, entry).items()}
    found = read(named, pipeline)
    for component, entry in tensors.items():
        check(found, component, entry, 1.0)


def test_kohyas_names_of_stable_diffusion_xl():
    """It trains on another layout of the UNet, numbered blocks; and two text encoders."""
    pipeline = build("sdxl")
    block = "up_blocks.0.attentions.0"
    tensors = matrices(
        pipeline.unet, [f"{block}.transformer_blocks.0.attn1.to_q", f"{block}.proj_in"]
    )
    first = matrices(pipeline.text_encoder, ["encoder.layers.0.mlp.fc1"])
    second = matrices(pipeline.text_encoder_2, ["text_model.encoder.layers.1.self_attn.q_proj"])
    alpha = torch.tensor(ALPHA)
    numbered = {key.replace(block, "output_blocks.0.1"): value for key, value in tensors.items()}
    named = kohya(numbered, "lora_unet_", alpha) | kohya(second, "lora_te2_", alpha)
    found = read(named | kohya(first, "lora_te1_text_model_", alpha), pipeline)
    check(found, "unet", tensors, ALPHA / RANK)
    check(found, "text_encoder", first, ALPHA / RANK)
    check(found, "text_encoder_2", second, ALPHA / RANK)


def test_kohyas_names_of_flux_with_joined_projections():
    """Diffusers splits them and multiplies alpha in: the products are what counts."""
    pipeline = build("flux")
    attention = pipeline.transformer.transformer_blocks[0].attn
    joined = nn.ModuleDict({"qkv": nn.Linear(attention.to_q.in_features, 3 * 16)})
    tensors = matrices(joined, ["qkv"])
    prefix = "lora_unet_double_blocks_0_img_attn_"
    found = read(kohya(tensors, prefix, torch.tensor(ALPHA)), pipeline, "transformer")
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    assert sorted(name for _, name in found) == sorted(names)
    A, B = tensors.values()
    for name, rows in zip(names, (ALPHA / RANK * B @ A).chunk(3), strict=True):
        weights = found["transformer", name][1]
        torch.testing.assert_close(weights.factor * weights.B @ weights.A, rows)


def test_alpha_of_pefts_settings(sd, unet_tensors, tmp_path):
    config = {"r": RANK, "lora_alpha": 12, "alpha_pattern": {"attn1.to_q": 3, "^conv_in": 99}}
    save_file(unet_tensors, tmp_path / "adapter_model.safetensors")
    for rooted, divisor in ((False, RANK), (True, RANK**0.5)):
        settings = {**config, "use_rslora": rooted}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        found = lora_layers(read_lora_file(tmp_path), sd, "unet")
        factors = {name: weights.factor for (_, name), (_, weights) in found.items()}
        assert factors.pop(ATTENTION[0]) == pytest.approx(3 / divisor)
        assert list(factors.values()) == pytest.approx([12 / divisor] * len(factors))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save=['conv_in']"),
    ],
)
def test_settings_that_change_the_result_are_refused(sd, unet_tensors, config, words):
    file = LoraFile("the LoRA 'x'", unet_tensors, {"": config})
    assert words in refused(lambda: lora_layers(file, sd, "unet"))


def test_alphas_twice_are_refused(sd, unet_tensors):
    tensors = kohya(unet_tensors, "lora_unet_", torch.tensor(ALPHA))
    file = LoraFile("the LoRA 'x'", tensors, {"unet": {"lora_alpha": 3}})
    assert "both as tensors and in its settings" in refused(lambda: lora_layers(file, sd, "unet"))


A = "unet.conv_in.lora_A.weight"
B = "unet.conv_in.lora_B.weight"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({A: None}, f"the key '{B}' without its partner"),
        ({B: None}, f"the key '{A}' without its partner"),
        ({A: torch.ones(2, 4, 3, 3)}, f"the shape [2, 4, 3, 3] under '{A}': expected [3, 4, 3, 3]"),
        ({B: torch.ones(9, 3, 1, 1)}, f"the shape [9, 3, 1, 1] under '{B}': expected [8, 3, 1, 1]"),
        ({A: torch.ones(3, 4)}, f"the shape [3, 4] under '{A}'"),
        ({B: torch.ones(8)}, f"the shape [3, 4, 3, 3] under '{A}'"),
        ({"unet.conv_in.lora_C.weight": torch.ones(1)}, "the key 'unet.conv_in.lora_C.weight'"),
        ({"unet.absent.lora_A.weight": torch.ones(1)}, "has no layer 'absent'"),
        ({"unet.conv_norm_out.lora_A.weight": torch.ones(1)}, "is GroupNorm: expected a linear"),
        ({"unet.mid_block.lora_A.weight": torch.ones(1)}, "is UNetMidBlock2DCrossAttn: expected"),
        ({"transformer.conv_in.lora_A.weight": torch.ones(1)}, "for the component 'transformer'"),
        (
            {"text_encoder_2.encoder.lora_A.weight": torch.ones(1)},
            "the component 'text_encoder_2' that StableDiffusionPipeline does not have",
        ),
    ],
)
def test_what_does_not_fit_is_named(sd, changes, words):
    tensors = of("unet", matrices(sd.unet, ["conv_in"])) | changes
    tensors = {key: value for key, value in tensors.items() if value is not None}
    assert words in refused(lambda: read(tensors, sd))


def test_a_lora_that_diffusers_cannot_read_for_the_pipeline(sd):
    tensors = {"lora_unet_conv_in.lora_down.weight": torch.ones(3, 4, 3, 3)}  # and no up
    message = refused(lambda: read(tensors, sd))
    assert "'lora_unet_conv_in.lora_down.weight'" in message
    assert "cannot be read for StableDiffusionPipeline" in message


def test_an_alpha_without_matrices_is_named():
    tensors = matrices(build("flux").transformer, ["proj_out"]) | {
        "x_embedder.alpha": torch.ones(1)
    }
    message = refused(lambda: read(of("transformer", tensors), build("flux"), "transformer"))
    assert "has 'transformer.x_embedder.alpha' without the matrices" in message
