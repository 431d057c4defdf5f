"""Training and saving of LoRAs through diffusers' calls, on every kind of quantized model."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

pytest.importorskip("peft", reason="diffusers' LoRA calls need peft, which is not installed")

from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from adapted_models import KINDS, dequantized, quantized
from architectures import build, session
from lora_files import of
from quantize_runs import refused, tree
from stepquant.api import load_lora, unload_lora
from stepquant.calibration.trajectories import predict
from stepquant.runtime.layers.lora_branch import named_branches

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2"]

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def original(kind):
    return build("sd") if kind == "float" else quantized("sd", kind)


@functools.cache
def inputs():
    return session("sd").trajectories.take(slice(0, 2))


def with_adapter(kind, start=0.1):
    """A pipeline with an adapter whose matrices are the same for every kind."""
    pipeline = copy.deepcopy(original(kind))
    unet = pipeline.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=LAYERS), "a")
    matrices = dict(unet.named_parameters())
    for number, key in enumerate(sorted(key for key in matrices if "lora_" in key)):
        generator = torch.Generator().manual_seed(number)
        matrices[key].data = start * torch.randn(matrices[key].shape, generator=generator)
    return pipeline


def loss_of(unet):
    target = torch.randn(inputs().sample.shape, generator=torch.Generator().manual_seed(3))
    return (predict(unet, inputs()) - target).square().mean()


def gradients(unet):
    loss_of(unet).backward()
    found = {k: p.grad for k, p in unet.named_parameters() if p.grad is not None}
    assert found and all("lora_" in key for key in found)
    return found


def cosine(found, wanted):
    assert found.keys() == wanted.keys()
    both = [torch.cat([each[key].flatten() for key in sorted(wanted)]) for each in (found, wanted)]
    return float(torch.nn.functional.cosine_similarity(*both, dim=0))


@pytest.mark.parametrize("kind", ["w8", "w4", "dynamic"])
def test_gradients_agree_with_those_of_the_float_model_of_the_same_weights(kind):
    control = with_adapter(kind)
    dequantized(control.unet)
    assert cosine(gradients(with_adapter(kind).unet), gradients(control.unet)) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_those_of_stepquants_own_branches(kind):
    pipeline, control = with_adapter(kind), copy.deepcopy(original(kind))
    state = get_peft_model_state_dict(pipeline.unet, adapter_name="a")
    load_lora(control, of("unet", state), 2.0, "a")
    wanted = {}
    for layer, _, _, branch in named_branches(control.unet):
        for which in "AB":
            matrix = getattr(branch, which).requires_grad_()
            wanted[f"{layer}.lora_{which}.a.weight"] = matrix
    loss_of(control.unet).backward()
    wanted = {key: matrix.grad for key, matrix in wanted.items()}
    assert cosine(gradients(pipeline.unet), wanted) > 0.9999


@pytest.mark.parametrize("kind", KINDS)
def test_training_reduces_the_loss(kind):
    unet = with_adapter(kind).unet
    optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(10):
        loss = loss_of(unet)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("kind", ["w8", "w8a8"])
def test_the_model_is_not_cast_to_save_its_lora(kind, upcast, tmp_path):
    unet = with_adapter(kind).unet
    torch.nn.Module.to(unet, torch.bfloat16)
    unet.save_lora_adapter(tmp_path, "a", upcast_before_saving=upcast)
    found = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    dtype = torch.float32 if upcast else torch.bfloat16
    assert unet.dtype == torch.bfloat16 and {each.dtype for each in found.values()} == {dtype}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_trained_lora_is_saved_and_loaded_by_both_ways(kind, tmp_path):
    pipeline, plain = with_adapter(kind), copy.deepcopy(original(kind))
    wanted = predict(pipeline.unet, inputs())
    pipeline.unet.save_lora_adapter(tmp_path / "adapter", "a")
    layers = get_peft_model_state_dict(pipeline.unet, adapter_name="a")
    StableDiffusionPipeline.save_lora_weights(tmp_path / "weights", unet_lora_layers=layers)
    file = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
    assert all("lora_" in key for key in load_file(file))
    without = predict(plain.unet, inputs())
    assert not torch.allclose(wanted, without, atol=1e-3)
    plain.unet.load_lora_adapter(
        tmp_path / "adapter", prefix=None, adapter_name="b", weight_name=file.name
    )
    torch.testing.assert_close(predict(plain.unet, inputs()), wanted, rtol=1e-4, atol=1e-4)
    plain.unload_lora_weights()
    load_lora(plain, tmp_path / "adapter")
    torch.testing.assert_close(predict(plain.unet, inputs()), wanted, rtol=1e-4, atol=1e-4)
    unload_lora(plain)
    # The file of `save_lora_weights` has no alpha unless its metadata are given: a factor of 1.
    plain.load_lora_weights(tmp_path / "weights", adapter_name="c")
    plain.set_adapters("c", 2.0)
    torch.testing.assert_close(predict(plain.unet, inputs()), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["w4", "dynamic", "w4a4"])
def test_a_model_is_saved_without_its_adapters_or_not_at_all(kind, tmp_path):
    pipeline = copy.deepcopy(original(kind))
    pipeline.unet.save_pretrained(tmp_path / "before")
    pipeline.unet.add_adapter(LoraConfig(r=3, target_modules=LAYERS), "a")
    message = refused(lambda: pipeline.unet.save_pretrained(tmp_path / "adapted"))
    assert "peft has wrapped the layer" in message and "unload_lora_weights" in message
    assert not list((tmp_path / "adapted").glob("*.safetensors"))
    pipeline.unload_lora_weights()
    pipeline.unet.save_pretrained(tmp_path / "after")
    assert tree(tmp_path / "after") == tree(tmp_path / "before")
