"""Packed weights: bytes that come back from a layout, and layouts that do not stay."""

from __future__ import annotations

import copy
import pickle

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from layer_cases import input_for, layers, seeded
from stepquant.quantizers.weight import minmax_weight_range
from stepquant.runtime.kernels import Kernel, choose, registered_kernels
from stepquant.runtime.kernels.onednn import ONEDNN
from stepquant.runtime.layers.packed_weight import PackedWeight
from stepquant.runtime.layers.released import Released
from stepquant.runtime.layers.resident import set_memory_mode
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.simulation.packing import pack_layer
from stepquant.support.errors import StepQuantError

MIXED = [2, 3, 4, 8, 5, 6, 7, 1]


def packed_layer(simulate, kind, bits=4, splits=None, mixed=False, halves=False):
    """A packed layer, and what its packed bytes are."""
    layer = simulate(seeded(kind), bits, 8, splits)
    if mixed:
        layer.set_channel_bits(torch.tensor(MIXED).clamp(max=bits))
        layer.fit_weights(minmax_weight_range)
    for quantizer in layer.weight_quantizers if halves else []:
        quantizer.zero_point.data.fill_(0.5)
    packed = pack_layer(layer)
    assert (packed.channel_bits is not None) == mixed
    assert packed.spec.half_zero_points == halves
    return packed, packed.weight_packed.clone()


@layers
@pytest.mark.parametrize("splits", [None, (7, 5)], ids=["whole", "parts"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("bits", "mixed", "halves"),
    [
        *((b, False, False) for b in range(1, 9)),
        (8, True, False),
        (3, False, True),
        (6, True, True),
    ],
    ids=str,
)
@torch.no_grad()
def test_bytes_that_are_not_kept_come_back(kind, splits, backend, bits, mixed, halves, simulate):
    layer, before = packed_layer(simulate, kind, bits, splits, mixed, halves)
    layer.backend = backend
    differences = layer.weight_differences()
    layer(input_for(kind))
    assert isinstance(layer.weight_packed, Released)
    assert torch.equal(layer.weight_packed, before)
    assert torch.equal(layer.packed_bytes(), before)
    for found, expected in zip(layer.weight_differences(), differences, strict=True):
        assert torch.equal(found, expected)


@layers
@pytest.mark.parametrize("splits", [None, (7, 5)], ids=["whole", "parts"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@torch.no_grad()
def test_low_memory_gives_the_same_numbers_and_keeps_no_layout(kind, splits, backend, simulate):
    layer, before = packed_layer(simulate, kind, 4, splits)
    layer.backend, x = backend, input_for(kind)
    for rows in (20, torch.tensor([40, 0, 40])):
        layer.context.set_timestep(rows)
        set_memory_mode(layer, "fast")
        expected = layer(x)
        set_memory_mode(layer, "low")
        for _ in range(2):
            assert torch.equal(layer(x), expected)
            assert type(layer.weight_packed) is torch.Tensor
            assert torch.equal(layer.weight_packed, before)
            assert all(part.weight.layout is None for part in layer.prepared_parts())


@torch.no_grad()
def test_a_layout_is_made_once_in_a_call(simulate, monkeypatch):
    layer, _ = packed_layer(simulate, "conv3x3", 4, (7, 5))
    set_memory_mode(layer, "low")
    asked, lay_out = [], PackedWeight._lay_out
    monkeypatch.setattr(PackedWeight, "_lay_out", lambda of: asked.append(of.index) or lay_out(of))
    layer.context.set_timestep(torch.tensor([40, 0, 20]))
    layer(input_for("conv3x3"))
    layer.context.set_timestep(20)
    layer(input_for("conv3x3"))
    assert asked == [0, 1, 0, 1]


@layers
@torch.no_grad()
def test_whoever_asks_a_released_layer_gets_its_bytes(kind, simulate, tmp_path):
    layer, before = packed_layer(simulate, kind)
    expected, x = layer(input_for(kind)), input_for(kind)
    assert type(layer.state_dict()["weight_packed"]) is torch.Tensor
    assert type(layer.state_dict(keep_vars=True)["weight_packed"]) is torch.Tensor
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    assert torch.equal(load_file(tmp_path / "layer.safetensors")["weight_packed"], before)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin.weight_packed) is torch.Tensor
        assert torch.equal(twin.weight_packed, before)
        assert torch.equal(twin(x), expected)
    assert isinstance(layer.weight_packed, Released)
    assert layer.weight_packed.numpy().tolist() == before.tolist()
    assert copy.deepcopy(layer.weight_packed).tolist() == before.tolist()
    assert layer.to(torch.bfloat16).weight_packed.tolist() == before.tolist()
    assert type(layer.weight_packed) is torch.Tensor
    assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_a_released_layer_takes_other_weights(simulate):
    ours, theirs = (packed_layer(simulate, "linear")[0] for _ in range(2))
    theirs.weight_packed.copy_(torch.arange(48))
    x = input_for("linear")
    ours(x)
    expected = theirs(x)
    ours.load_state_dict(theirs.state_dict())
    assert ours.weight_packed.tolist() == list(range(48))
    assert torch.equal(ours(x), expected)


@torch.no_grad()
def test_bytes_that_a_layout_does_not_hold_are_kept(simulate):
    """Here those of the last half byte, which no code takes."""
    torch.manual_seed(1)
    layer = pack_layer(simulate(nn.Linear(3, 5), 4, 8))
    layer.weight_packed[-1] |= 0xF0
    before = layer.weight_packed.clone()
    layer(torch.randn(2, 3))
    assert type(layer.weight_packed) is torch.Tensor
    assert torch.equal(layer.weight_packed, before)


@torch.no_grad()
def test_a_stand_in_cannot_be_written_to(simulate):
    layer, before = packed_layer(simulate, "linear")
    layer(input_for("linear"))
    for write in (lambda t: t.zero_(), lambda t: t.copy_(before), lambda t: t.bitwise_not_()):
        with pytest.raises(
            StepQuantError, match="change them with load_state_dict, or call set_memory_mode"
        ):
            write(layer.weight_packed)
    assert torch.equal(layer.weight_packed, before)
    assert torch.equal(torch.empty(48, dtype=torch.uint8).copy_(layer.weight_packed), before)


@pytest.mark.parametrize("offload_buffers", [True, False])
@torch.no_grad()
def test_bytes_stay_where_accelerate_moves_tensors(offload_buffers, simulate):
    layer, before = packed_layer(simulate, "conv3x3")
    expected, x = layer(input_for("conv3x3")), input_for("conv3x3")  # released before its hook
    accelerate.cpu_offload(layer, "cpu", offload_buffers=offload_buffers)
    for _ in range(2):
        assert torch.equal(layer(x), expected)
    accelerate.hooks.remove_hook_from_module(layer)
    assert torch.equal(layer.weight_packed, before)
    other, before = packed_layer(simulate, "conv3x3")
    accelerate.cpu_offload(other, "cpu", offload_buffers=False)
    assert torch.equal(other(x), expected)
    assert type(other.weight_packed) is torch.Tensor


@pytest.mark.parametrize("kernel", registered_kernels().values(), ids=lambda each: each.name)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@torch.no_grad()
def test_kernels_give_back_what_they_laid_out(kernel: Kernel, kind: str):
    if kernel is ONEDNN and ONEDNN.why_not(LayerSpec("linear", 8, 8, 4, 8), torch.device("cpu")):
        pytest.skip("no oneDNN kernels here")
    size = (3, 3) if kind == "conv2d" else (1, 1)
    spec = LayerSpec(kind, 35, 19, 8, 8, size)
    weight = torch.randint(-128, 128, spec.weight_shape, dtype=torch.int8)
    laid_out, *_ = kernel.prepare(weight, torch.rand(19) + 0.1, spec)
    assert torch.equal(kernel.differences(laid_out, spec), weight)


@torch.no_grad()
def test_the_parts_of_a_layer_know_their_bytes_before_and_after_they_are_laid_out(simulate):
    layer, before = packed_layer(simulate, "conv3x3", 4, (7, 5), halves=True)
    sizes = [spec.packed_bytes for spec in layer.part_specs()]
    for _ in range(2):
        weights = layer.packed_weights()
        for weight, expected in zip(weights, before.split(sizes), strict=True):
            assert torch.equal(weight.packed(), expected)
        for weight, scale in zip(weights, layer.difference_scales(), strict=True):
            assert torch.equal(weight.scale(), scale)
        layer(input_for("conv3x3"))
    assert weights[0] is layer.prepared_parts()[0].weight
    assert weights[0].kernel is choose(weights[0].spec, torch.device("cpu")).kernel
    assert {id(each) for each in weights[1].held()} == {id(each) for each in weights[1].state()}


@torch.no_grad()
def test_a_stand_in_is_whole_whatever_becomes_of_its_layer(simulate):
    layer, before = packed_layer(simulate, "linear")
    layer(input_for("linear"))
    released = layer.weight_packed
    layer.weight_zero_point.add_(1)
    layer.drop_layout()
    del layer
    assert isinstance(released, Released) and torch.equal(released, before)
