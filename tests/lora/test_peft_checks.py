"""Adapters that quantized layers do not take are refused by name, before the model changes."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

pytest.importorskip("peft", reason="diffusers' LoRA calls need peft, which is not installed")

from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model

from adapted_models import quantized, weight_only
from architectures import ARCHITECTURES, build, session
from lora_files import matrices, of
from quantize_runs import refused
from stepquant import methods
from stepquant.api import WeightOnlyConfig, load_lora, quantize
from stepquant.calibration.trajectories import predict
from stepquant.engines.openvino_export import check_no_lora_branch
from stepquant.methods.recipe import Recipe

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "up_blocks.1.resnets.0.conv1"
KINDS = ["w4", "dynamic", "w4a4"]
FEW = {"calibration.trajectories": 2, "ranges.weights": "minmax", "ranges.activations": "minmax"}

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def original(kind):
    return quantized("sd", kind)


@pytest.fixture
def lora():
    return of("unet", matrices(build("sd").unet, [LAYER, CONV]))


def output(pipeline):
    with torch.no_grad():
        return predict(pipeline.unet, data())


@functools.cache
def data():
    return session("sd").trajectories


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fusing(kind, scale, lora):
    pipeline = copy.deepcopy(original(kind))
    pipeline.load_lora_weights(lora, adapter_name="a")
    before, names = output(pipeline), list(pipeline.unet.state_dict())
    calls = (
        lambda: pipeline.fuse_lora(lora_scale=scale),
        lambda: pipeline.unet.fuse_lora(scale),
        lambda: pipeline.unet.get_submodule(LAYER).merge(),
    )
    for call in calls:
        message = refused(call)
        assert "a LoRA cannot be fused into them" in message
        assert "call fuse_lora on the float pipeline" in message
    assert torch.equal(output(pipeline), before) and list(pipeline.unet.state_dict()) == names
    pipeline.unet.unfuse_lora()
    assert torch.equal(output(pipeline), before)


def test_fusing_a_quantized_text_encoder_leaves_a_float_unet_as_it_was(lora):
    pipeline = build("sd")
    text = "encoder.layers.0.self_attn.q_proj"
    tensors = of("text_encoder", matrices(pipeline.text_encoder, [text]))
    weight_only(pipeline.text_encoder, WeightOnlyConfig())
    pipeline.load_lora_weights({**lora, **tensors})
    before = pipeline.unet.get_submodule(LAYER).base_layer.weight.clone()
    assert f"the layer '{text}'" in refused(lambda: pipeline.fuse_lora())
    assert torch.equal(pipeline.unet.get_submodule(LAYER).base_layer.weight, before)


def test_a_float_model_is_fused_as_ever(lora):
    pipeline = build("sd")
    pipeline.load_lora_weights(lora)
    wanted = output(pipeline)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(output(pipeline), wanted, rtol=1e-3, atol=1e-3)


CONFIGS = {
    "DoRA": (LoraConfig(use_dora=True, target_modules=[LAYER]), "use_dora=True"),
    "PiSSA": (LoraConfig(init_lora_weights="pissa", target_modules=[LAYER]), "'pissa'"),
    "OLoRA": (LoraConfig(init_lora_weights="olora", target_modules=[LAYER]), "'olora'"),
    "LoHa": (LoHaConfig(target_modules=[LAYER]), "kind LOHA"),
    "LoKr": (LoKrConfig(target_modules=[CONV]), "kind LOKR"),
    "OFT": (OFTConfig(target_modules=[LAYER]), "kind OFT"),
    "IA3": (IA3Config(target_modules=[LAYER], feedforward_modules=[]), "kind IA3"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_other_adapters(kind, name):
    config, words = CONFIGS[name]
    pipeline = copy.deepcopy(original(kind))
    before = output(pipeline)
    message = refused(lambda: pipeline.unet.add_adapter(copy.deepcopy(config), "a"))
    assert words in message and "the adapter 'a'" in message and "expected" in message
    message = refused(lambda: get_peft_model(pipeline.unet, copy.deepcopy(config)))
    assert words in message
    assert torch.equal(output(pipeline), before)
    assert pipeline.unet.state_dict().keys() == original(kind).unet.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_dora_and_lokr(kind):
    pipeline = copy.deepcopy(original(kind))
    dora = matrices(build("sd").unet, [LAYER])
    dora[f"{LAYER}.lora_magnitude_vector"] = torch.ones(dora[f"{LAYER}.lora_B.weight"].shape[0])
    message = refused(lambda: pipeline.unet.load_lora_adapter(dora, prefix=None, adapter_name="a"))
    assert "use_dora=True" in message
    lokr = {f"{LAYER}.lokr_w1": torch.ones(2, 2), f"{LAYER}.lokr_w2": torch.ones(4, 4)}
    message = refused(lambda: pipeline.unet.load_lora_adapter(lokr, prefix=None, adapter_name="a"))
    assert "kind LOKR" in message
    assert pipeline.unet.state_dict().keys() == original(kind).unet.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_stayed_float_take_other_adapters(kind):
    """Only quantized layers are checked: the last conv is float here."""
    pipeline = copy.deepcopy(original(kind))
    unet, last = pipeline.unet, build("sd").unet.conv_out
    unet.conv_out = last
    unet.add_adapter(LoraConfig(use_dora=True, target_modules=["conv_out"]), "a")
    assert type(unet.conv_out).__name__ == "Conv2d" and unet.conv_out.base_layer is last


@pytest.mark.parametrize("step", ["smoothing", "weight_dilation"])
def test_layers_with_folded_scalings(step, lora):
    recipe = Recipe(name="scaled", description="One scaling.", steps=(methods.STEPS[step](),))
    arguments = ARCHITECTURES["sd"].arguments
    pipeline = quantize(build("sd"), recipe, 8, 8, None, 3, FEW, **arguments).pipeline
    before = output(pipeline)
    message = refused(lambda: pipeline.load_lora_weights(lora, adapter_name="a"))
    assert f"'{LAYER}'" in message and f"--set {step}.fold=false" in message
    assert torch.equal(output(pipeline), before)
    others = {key: value for key, value in lora.items() if CONV in key}
    pipeline.load_lora_weights(others, adapter_name="b")


@pytest.mark.parametrize("kind", KINDS)
def test_what_needs_plain_layers(kind, lora):
    pipeline = copy.deepcopy(original(kind))
    pipeline.load_lora_weights(lora, adapter_name="a")
    message = refused(lambda: load_lora(pipeline, lora))
    assert f"'{LAYER}' of UNet2DConditionModel has an adapter of peft" in message
    if kind == "w4a4":
        message = refused(pipeline.unet.dequantize)
        assert "has the adapter 'a' of peft" in message and "unload_lora_weights" in message


def test_a_float_pipeline_with_an_adapter_is_not_quantized(lora):
    pipeline = build("sd")
    pipeline.load_lora_weights(lora, adapter_name="a")
    arguments = ARCHITECTURES["sd"].arguments
    message = refused(lambda: quantize(pipeline, "minmax", steps=2, **arguments))
    assert "has the adapter 'a' of peft" in message and "fuse_lora" in message


def test_openvino_refuses_adapters(lora):
    pipeline = copy.deepcopy(original("w4a4"))
    pipeline.load_lora_weights(lora, adapter_name="a")
    assert "has the adapter 'a' of peft" in refused(lambda: check_no_lora_branch(pipeline.unet))
    pipeline.unload_lora_weights()
    check_no_lora_branch(pipeline.unet)
