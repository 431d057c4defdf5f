"""Widths of LoRAs for Flux, whose loader compares them with the shapes of weights."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

pytest.importorskip("peft", reason="diffusers' LoRA calls need peft, which is not installed")

from adapted_models import quantized
from architectures import build, session
from lora_files import matrices, of
from quantize_runs import refused
from stepquant.api import load_lora, unload_lora
from stepquant.calibration.trajectories import predict

LAYER = "transformer_blocks.0.attn.to_q"
KINDS = ["w8", "w4", "dynamic", "w8a8"]

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def original(kind):
    return quantized("flux", kind)


@torch.no_grad()
def output(pipeline):
    return predict(pipeline.transformer, session("flux").trajectories)


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrower_lora_reads_the_first_channels(kind):
    pipeline = copy.deepcopy(original(kind))
    tensors = of("transformer", matrices(build("flux").transformer, [LAYER]))
    A = f"transformer.{LAYER}.lora_A.weight"
    padded = {**tensors, A: torch.nn.functional.pad(tensors[A][:, :10], (0, 6))}
    load_lora(pipeline, padded)
    wanted = output(pipeline)
    unload_lora(pipeline)
    pipeline.load_lora_weights({**tensors, A: tensors[A][:, :10]})
    torch.testing.assert_close(output(pipeline), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_lora_which_widens_a_layer_is_refused(kind):
    pipeline = copy.deepcopy(original(kind))
    names = list(pipeline.transformer.state_dict())
    tensors = of("transformer", matrices(build("flux").transformer, [LAYER]))
    A = f"transformer.{LAYER}.lora_A.weight"
    wide = {**tensors, A: torch.nn.functional.pad(tensors[A], (0, 16))}
    message = refused(lambda: pipeline.load_lora_weights(wide))
    assert f"[3, 32] under '{A}'" in message and f"'{LAYER}' reads 16 channels" in message
    assert list(pipeline.transformer.state_dict()) == names


@pytest.mark.parametrize("kind", ["w4", "w8a8"])
def test_layers_that_stayed_float_go_diffusers_way(kind):
    """A second LoRA, with a layer that has an adapter, a float one and a quantized one."""
    pipeline = copy.deepcopy(original(kind))
    pipeline.transformer.x_embedder = build("flux").transformer.x_embedder
    layers = [LAYER, "x_embedder", "single_transformer_blocks.0.proj_mlp"]
    tensors = of("transformer", matrices(build("flux").transformer, layers))
    load_lora(pipeline, tensors)
    wanted = output(pipeline)
    unload_lora(pipeline)
    first = {key: value for key, value in tensors.items() if LAYER in key}
    pipeline.load_lora_weights(dict(first), adapter_name="a")
    pipeline.load_lora_weights(dict(tensors), adapter_name="b")
    pipeline.set_adapters("b")
    torch.testing.assert_close(output(pipeline), wanted, rtol=1e-4, atol=1e-4)
