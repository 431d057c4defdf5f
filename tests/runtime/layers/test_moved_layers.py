"""Packed layers on their way between devices: `.to`, and accelerate's hooks, which move by hand."""

from __future__ import annotations

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from layer_cases import input_for, layers, seeded
from stepquant.quantizers import StepContext
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.weight_only import weight_only_in_place_of
from stepquant.simulation.packing import pack_layer

X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def network(simulate):
    """Two packed convs with tables of five steps, the second with a per-channel scaling."""
    convs = [simulate(nn.Conv2d(8, 8, 3, padding=1), 4, 8) for _ in range(2)]
    convs[1].multiply_channel_scale(torch.linspace(0.5, 2.0, 8))
    return nn.Sequential(*(pack_layer(conv) for conv in convs)).eval()


def tensors_of(value, found):
    """Every tensor that can be reached from `value`, but for the step context."""
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, dict):
        for entry in value.values():
            tensors_of(entry, found)
    elif isinstance(value, list | tuple):
        for entry in value:
            tensors_of(entry, found)
    elif hasattr(value, "__dict__") and not isinstance(value, StepContext | type):
        tensors_of({k: v for k, v in vars(value).items() if not callable(v)}, found)
    return found


@torch.no_grad()
def test_nothing_that_a_layer_computes_with_stays_behind(network):
    network(X)  # lays the weights out
    for layer in network.to("meta"):
        found = tensors_of(vars(layer), [])
        assert len(found) >= 5
        assert {tensor.device.type for tensor in found} == {"meta"}
    assert not sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def test_weight_only_layers_move_whole():
    layer = weight_only_in_place_of(nn.Linear(8, 4)).to("meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("offload_buffers", [True, False])
@torch.no_grad()
def test_accelerate_s_hooks_change_no_number(network, offload_buffers):
    """What `enable_sequential_cpu_offload` does to each layer, with the CPU as the accelerator."""
    before = network(X)
    accelerate.cpu_offload(network, "cpu", offload_buffers=offload_buffers)
    kept = {tensor.device.type for tensor in network.buffers()}
    assert kept == {"meta" if offload_buffers else "cpu"}
    for _ in range(2):
        assert torch.equal(network(X), before)
    assert {tensor.device.type for tensor in network.buffers()} == kept
    remove_hook_from_submodules(network)
    assert torch.equal(network(X), before)
    assert {tensor.device.type for tensor in network.buffers()} == {"cpu"}


@torch.no_grad()
def test_hooks_before_the_first_call_change_no_number_either(network):
    accelerate.cpu_offload(network, "cpu", offload_buffers=True)
    offloaded = network(X)
    remove_hook_from_submodules(network)
    assert torch.equal(network(X), offloaded)


@torch.no_grad()
def test_a_layer_that_was_moved_by_hand_is_laid_out_anew(network, monkeypatch):
    """No method of the module is called, so it has to look."""
    layer = network[0]
    assert isinstance(layer, IntegerLayer)
    layer(X)
    for name, _ in list(layer.named_buffers()):
        set_module_tensor_to_device(layer, name, "meta")
    asked, before = [], layer._prepared

    def prepare():
        asked.append(layer.weight_packed.device.type)
        return before

    monkeypatch.setattr(layer, "prepare", prepare)
    layer.kernel_names()
    assert asked == ["meta"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@layers
@torch.no_grad()
def test_offloaded_layers_run_on_cuda(kind, simulate):
    packed = pack_layer(simulate(seeded(kind), 4, 8))
    x = input_for(kind)
    before = packed(x)
    accelerate.cpu_offload(packed, "cuda", offload_buffers=True)
    torch.testing.assert_close(packed(x.cuda()).cpu(), before, rtol=1e-5, atol=1e-5)
