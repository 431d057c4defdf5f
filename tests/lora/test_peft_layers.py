"""LoRAs through the calls of diffusers and peft, on every kind of quantized model.

Controls are stepquant's own branches, and for weight-only models the float model with the same
weights and the same LoRA.
"""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="diffusers' LoRA calls need peft, which is not installed")

from accelerate import cpu_offload
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

from adapted_models import CONFIGS, KINDS, dequantized, quantized, weight_only
from architectures import ARCHITECTURES, build, session
from concurrent_calls import at_once
from lora_files import ALPHA, RANK, kohya, matrices, of
from quantize_runs import refused
from stepquant.api import RecordedDenoiser, load_lora, set_lora_scales, unload_lora
from stepquant.calibration.trajectories import predict
from stepquant.lora.peft_layers import LoraOnConv2d, LoraOnLinear
from stepquant.models.calling import call_denoiser
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.weight_only import WeightOnly
from stepquant.runtime.ops import native
from stepquant.support.refusal import RefusalCode

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = {
    "sd": [
        f"{BLOCK}.attn1.to_q",
        f"{BLOCK}.attn2.to_k",
        f"{BLOCK}.attn2.to_out.0",
        f"{BLOCK}.ff.net.0.proj",
        "down_blocks.0.attentions.0.proj_in",  # a conv of 1x1
        "up_blocks.1.resnets.0.conv1",  # of 3x3, reads a concatenation
        "down_blocks.0.downsamplers.0.conv",  # with a stride
        "mid_block.resnets.0.time_emb_proj",
    ],
    "sdxl": ["up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "add_embedding.linear_1"],
    "pixart": ["transformer_blocks.0.attn2.to_k", "proj_out"],
    "sd3": ["transformer_blocks.0.attn.add_v_proj", "transformer_blocks.1.ff.net.2"],
    "flux": ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"],
}
EVERY = [("sd", kind) for kind in KINDS]
EVERY += [(name, kind) for name in list(LAYERS)[1:] for kind in ("w4", "dynamic", "w4a4")]

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def original(name, kind):
    return quantized(name, kind)


@functools.cache
def trajectories(name):
    return session(name).trajectories


@functools.cache
def lora(name, size=0.5):
    return matrices(denoiser(build(name), name), LAYERS[name], size)


def fresh(name, kind):
    return copy.deepcopy(original(name, kind))


def denoiser(pipeline, name):
    return getattr(pipeline, ARCHITECTURES[name].component)


@torch.no_grad()
def output(pipeline, name):
    return predict(denoiser(pipeline, name), trajectories(name))


def put(pipeline, name, tensors, adapter="a"):
    """Load the LoRA with the call that this architecture has in diffusers."""
    if name == "pixart":  # diffusers has none for it
        model = denoiser(pipeline, name)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS[name])
        inject_adapter_in_model(config, model, adapter)
        assert not set_peft_model_state_dict(model, tensors, adapter).unexpected_keys
    else:
        named = of(ARCHITECTURES[name].component, tensors)
        pipeline.load_lora_weights(named, adapter_name=adapter)


def own(pipeline, name, scales):
    """The output with LoRAs in stepquant's own branches, given as `(tensors, scale)`."""
    for number, (tensors, scale) in enumerate(scales):
        named = of(ARCHITECTURES[name].component, tensors)
        load_lora(pipeline, named, scale, str(number))
    found = output(pipeline, name)
    unload_lora(pipeline)
    return found


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_the_result_is_that_of_stepquants_own_branches(name, kind):
    pipeline = fresh(name, kind)
    without, wanted = output(pipeline, name), own(pipeline, name, [(lora(name), 1.0)])
    assert not torch.allclose(wanted, without, atol=0.01)
    put(pipeline, name, lora(name))
    close(output(pipeline, name), wanted)
    recurse_remove_peft_layers(denoiser(pipeline, name))
    assert torch.equal(output(pipeline, name), without)


@pytest.mark.parametrize(("name", "kind"), [each for each in EVERY if each[1] in ("w8", "w4")])
def test_a_weight_only_model_is_the_float_model_of_its_weights(name, kind):
    pipeline, control = fresh(name, kind), fresh(name, kind)
    dequantized(denoiser(control, name))
    for each in (pipeline, control):
        put(each, name, lora(name))
    close(output(pipeline, name), output(control, name))


@pytest.mark.parametrize("kind", ["w4", "dynamic", "w4a4"])
def test_two_adapters_with_scales_switched_off_and_deleted(kind):
    pipeline, other = fresh("sd", kind), lora("sd", 0.25)
    model, without = pipeline.unet, output(pipeline, "sd")
    half = dict(list(other.items())[:6])
    put(pipeline, "sd", lora("sd"), "a")
    put(pipeline, "sd", half, "b")
    plain = fresh("sd", kind)
    pipeline.set_adapters(["a", "b"], [0.5, -2.0])
    close(output(pipeline, "sd"), own(plain, "sd", [(lora("sd"), 0.5), (half, -2.0)]))
    model.disable_lora()
    assert torch.equal(output(pipeline, "sd"), without)
    model.enable_lora()
    pipeline.set_adapters("b")
    only = own(plain, "sd", [(half, 1.0)])
    close(output(pipeline, "sd"), only)
    pipeline.delete_adapters("a")
    close(output(pipeline, "sd"), only)
    pipeline.delete_adapters("b")
    assert torch.equal(output(pipeline, "sd"), without)
    pipeline.unload_lora_weights()
    assert torch.equal(output(pipeline, "sd"), without)
    assert model.state_dict().keys() == plain.unet.state_dict().keys()


@pytest.mark.parametrize("kind", ["w8", "dynamic", "w8a8"])
def test_the_scale_of_a_call(kind):
    """diffusers multiplies the layers' scales for one call, and divides them again."""
    pipeline, data = fresh("sd", kind), trajectories("sd")
    wanted = own(pipeline, "sd", [(lora("sd"), 0.5)])
    put(pipeline, "sd", lora("sd"))
    before = output(pipeline, "sd")
    arguments = {**data.conditions.arguments(), "cross_attention_kwargs": {"scale": 0.5}}
    with torch.no_grad():
        close(call_denoiser(pipeline.unet, data.sample, data.timestep, arguments), wanted)
    assert torch.equal(output(pipeline, "sd"), before)


@pytest.mark.parametrize("rank", [RANK, 2, 5])
@pytest.mark.parametrize("kind", ["w4", "dynamic", "w8a8"])
def test_an_adapter_is_swapped_in_place(kind, rank):
    pipeline, plain = fresh("sd", kind), fresh("sd", kind)
    with_rank = resized(lora("sd", 0.25), rank)
    if rank != RANK:
        pipeline.enable_lora_hotswap(target_rank=5)
    put(pipeline, "sd", lora("sd"))
    close(output(pipeline, "sd"), own(plain, "sd", [(lora("sd"), 1.0)]))
    named = of("unet", with_rank)
    pipeline.load_lora_weights(named, adapter_name="a", hotswap=True)
    close(output(pipeline, "sd"), own(plain, "sd", [(with_rank, 1.0)]))


def resized(tensors, rank):
    """Matrices of another rank: the first rows, or with random ones behind."""
    found = {}
    for number, (key, tensor) in enumerate(tensors.items()):
        dim = 0 if "lora_A" in key else 1
        more = list(tensor.shape)
        more[dim] = max(0, rank - RANK)
        behind = torch.randn(more, generator=torch.Generator().manual_seed(number))
        found[key] = torch.cat([tensor, 0.1 * behind], dim).narrow(dim, 0, rank).contiguous()
    return found


def all_layers(model):
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and "conv_" not in name
    ]


@pytest.mark.parametrize("kind", ["w4", "w4a4"])
def test_kohyas_names_of_every_layer_with_alphas(kind):
    """The layout of LCM LoRAs: every linear and conv layer, an alpha for each."""
    pipeline, tensors = fresh("sd", kind), matrices(build("sd").unet, all_layers(build("sd").unet))
    named = kohya(tensors, "lora_unet_", torch.tensor(ALPHA))
    load_lora(pipeline, named)
    wanted = output(pipeline, "sd")
    unload_lora(pipeline)
    pipeline.load_lora_weights(dict(named))
    torch.testing.assert_close(output(pipeline, "sd"), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["w4", "w4a4"])
def test_kohyas_names_for_flux(kind):
    layers = ["double_blocks_0_img_attn_proj", "single_blocks_0_linear2"]
    shapes = {"double_blocks_0_img_attn_proj": (16, 16), "single_blocks_0_linear2": (16, 80)}
    named = {}
    for number, name in enumerate(layers):
        out, inner = shapes[name]
        generator = torch.Generator().manual_seed(number)
        named[f"lora_unet_{name}.lora_down.weight"] = torch.randn(RANK, inner, generator=generator)
        named[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out, RANK, generator=generator)
        named[f"lora_unet_{name}.alpha"] = torch.tensor(ALPHA)
    pipeline = fresh("flux", kind)
    load_lora(pipeline, named)
    wanted = output(pipeline, "flux")
    unload_lora(pipeline)
    assert not torch.allclose(output(pipeline, "flux"), wanted, atol=0.01)
    pipeline.load_lora_weights(dict(named))
    close(output(pipeline, "flux"), wanted)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_text_encoders(kind):
    pipeline = build("sd")
    encoder, ids = pipeline.text_encoder, torch.arange(8)[None]
    tensors = matrices(encoder, [f"encoder.layers.{n}.self_attn.q_proj" for n in range(2)], 3.0)
    weight_only(encoder, CONFIGS[kind]())
    without = encoder(ids)[0]
    load_lora(pipeline, of("text_encoder", tensors), 0.5)
    wanted = encoder(ids)[0]
    unload_lora(pipeline)
    pipeline.load_lora_weights(of("text_encoder", tensors), adapter_name="a")
    pipeline.set_adapters("a", 0.5)
    assert isinstance(encoder.encoder.layers[0].self_attn.q_proj.base_layer, WeightOnly)
    close(encoder(ids)[0], wanted)
    assert not torch.allclose(wanted, without, atol=0.01)
    pipeline.unload_lora_weights()
    assert torch.equal(encoder(ids)[0], without)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["w8", "w8a8"])
def test_matrices_stay_float32_beside_layers_of_another_dtype(kind, dtype):
    pipeline = fresh("sd", kind)
    nn.Module.to(pipeline.unet, dtype)
    put(pipeline, "sd", {key: value.to(dtype) for key, value in lora("sd").items()})
    wrapped = [
        each for each in pipeline.unet.modules() if isinstance(each, LoraOnLinear | LoraOnConv2d)
    ]
    found = {
        value.dtype
        for each in wrapped
        for value in (*each.lora_A.parameters(), *each.lora_B.parameters())
    }
    assert len(wrapped) == len(LAYERS["sd"]) and found == {torch.float32}
    assert pipeline.unet.dtype == dtype


@pytest.mark.parametrize("kind", ["w8a8", "w4a4"])
def test_a_captured_denoiser_sees_adapters_come_change_and_go(kind):
    pipeline = fresh("sd", kind)
    recorded, data = RecordedDenoiser(pipeline.unet), trajectories("sd").take(slice(0, 1))

    @torch.no_grad()
    def both():
        found = [predict(recorded, data) for _ in range(3)]
        wanted = predict(pipeline.unet, data)
        assert all(torch.equal(each, wanted) for each in found)
        return wanted

    without = both()
    put(pipeline, "sd", lora("sd"))
    loaded = both()
    pipeline.set_adapters("a", 0.5)
    scaled = both()
    pipeline.load_lora_weights(of("unet", lora("sd", 0.7)), adapter_name="a", hotswap=True)
    swapped = both()
    results = [without, loaded, scaled, swapped]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(results))
    if native.why_no_products() is None:
        assert recorded.reasons == ["a LoRA"] and recorded.recordings == 0
    pipeline.unload_lora_weights()
    assert torch.equal(both(), without)


@pytest.mark.parametrize("kind", ["w4", "w4a4"])
@torch.no_grad()
def test_copies_and_threads(kind):
    pipeline, batch = fresh("sd", kind), trajectories("sd").take(slice(0, 1))
    put(pipeline, "sd", lora("sd"))
    wanted = predict(pipeline.unet, batch)
    copied = copy.deepcopy(pipeline.unet)
    pipeline.unload_lora_weights()
    assert torch.equal(predict(copied, batch), wanted)
    results = at_once(*[lambda: predict(copied, batch)] * 4)
    assert all(torch.equal(each, wanted) for each in results)


def test_both_ways_of_loading_add_up():
    """A branch of stepquant lies inside the layer that peft wraps."""
    pipeline, plain = fresh("sd", "w8a8"), fresh("sd", "w8a8")
    load_lora(pipeline, of("unet", lora("sd", 0.25)), name="own")
    put(pipeline, "sd", lora("sd"))
    close(output(pipeline, "sd"), own(plain, "sd", [(lora("sd", 0.25), 1.0), (lora("sd"), 1.0)]))
    set_lora_scales(pipeline, {"own": 0})
    close(output(pipeline, "sd"), own(plain, "sd", [(lora("sd"), 1.0)]))
    assert any(isinstance(module, IntegerLayer) for module in pipeline.unet.modules())


PATTERNS = {
    "r": RANK,
    "lora_alpha": ALPHA,
    "rank_pattern": {"attn2.to_k": 5, "mid_block.*": 2},
    "alpha_pattern": {"attn1.to_q": 1.5, "downsamplers.0.conv": 12.0},
    "use_rslora": True,
}


@pytest.mark.parametrize("kind", ["w8", "w4"])
def test_the_settings_of_a_config_mean_what_they_do_in_a_float_model(kind):
    pipeline, control = fresh("sd", kind), fresh("sd", kind)
    dequantized(control.unet)
    for each in (pipeline, control):
        each.unet.add_adapter(LoraConfig(target_modules=LAYERS["sd"], **PATTERNS), "a")
        matrices_of = {k: v for k, v in each.unet.named_parameters() if "lora_" in k}
        for number, key in enumerate(sorted(matrices_of)):
            generator = torch.Generator().manual_seed(number)
            value = matrices_of[key]
            value.data = torch.randn(value.shape, generator=generator) * 0.2
    close(output(pipeline, "sd"), output(control, "sd"))


@pytest.mark.parametrize("kind", ["w4", "w4a4"])
def test_dropout_does_not_run_in_sampling(kind):
    pipeline = fresh("sd", kind)
    config = LoraConfig(
        r=RANK, lora_dropout=0.5, target_modules=LAYERS["sd"], init_lora_weights="gaussian"
    )
    pipeline.unet.add_adapter(config, "a")
    assert not any(module.training for module in pipeline.unet.modules())
    pipeline.unet.train()
    assert all(module.training for module in pipeline.unet.modules())


@pytest.mark.parametrize("kind", ["w4", "dynamic", "w4a4"])
@torch.no_grad()
def test_offloaded_models(kind):
    """accelerate's hooks move what peft has wrapped, too."""
    pipeline = fresh("sd", kind)
    put(pipeline, "sd", lora("sd"))
    wanted = output(pipeline, "sd")
    cpu_offload(pipeline.unet, torch.device("cpu"))
    close(output(pipeline, "sd"), wanted)
    away = fresh("sd", kind)
    cpu_offload(away.unet, torch.device("cpu"), offload_buffers=True)
    message = refused(lambda: away.unet.load_lora_adapter(lora("sd"), prefix=None))
    assert "has its tensors offloaded" in message and "before offloading" in message
    parameters = fresh("sd", kind)  # in which packed layers hold nothing
    cpu_offload(parameters.unet, torch.device("cpu"))
    if kind == "w4a4":
        parameters.unet.load_lora_adapter(lora("sd"), prefix=None, adapter_name="a")
        close(output(parameters, "sd"), wanted)
    else:
        refused(lambda: parameters.unet.load_lora_adapter(lora("sd"), prefix=None))


def test_blocks_say_that_a_lora_keeps_them_from_codes():
    pipeline = fresh("sd", "w8a8")
    block = pipeline.unet.get_submodule(BLOCK)
    before = block.why_plain()
    put(pipeline, "sd", lora("sd"))
    assert before is None and block.why_plain().code == RefusalCode.LORA
    pipeline.unload_lora_weights()
    assert block.why_plain() is None
