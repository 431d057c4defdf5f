"""Layers with 8-bit weights against the float layer with those weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layer_cases import LAYERS, input_for, seeded
from stepquant.numerics import fake_quantize
from stepquant.quantizers.weight import minmax_weight_range
from stepquant.runtime.layers.weight_only import (
    weight_codes,
    weight_only_in_place_of,
    weight_only_tensors,
)

KINDS = {
    **LAYERS,
    "conv-grouped": lambda: nn.Conv2d(12, 8, 3, groups=4),
    "conv-reflect": lambda: nn.Conv2d(12, 8, 3, padding=1, padding_mode="reflect"),
    "conv-same": lambda: nn.Conv2d(12, 8, 3, padding="same"),
}


def test_codes_and_scales_by_hand():
    weight = torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0], [-254.0, 3.0, 1.1]])
    codes, scale = weight_codes(weight)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    assert codes.tolist() == [[127, -50, 0], [0, 0, 0], [-127, 2, 1]]  # 1.5 to even
    torch.testing.assert_close(scale, torch.tensor([0.01, 1.0, 2.0]))


def test_the_error_of_a_weight_is_at_most_half_a_step():
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    codes, scale = weight_codes(weight)
    error = (codes * scale.view(-1, 1, 1, 1) - weight).abs().flatten(1).amax(dim=1)
    assert bool((error <= 0.5001 * scale).all())
    assert bool((codes.flatten(1).abs().amax(dim=1) == 127).all())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_layer_computes_with_the_weight_that_its_codes_stand_for(kind):
    torch.manual_seed(1)
    layer, x = KINDS[kind](), input_for(kind)
    new, float_result = weight_only_in_place_of(layer), layer(x)
    codes, scale = weight_codes(layer.weight)
    assert set(new.state_dict()) == set(layer.state_dict()) | {"weight_scale"}
    assert new.weight.dtype == torch.int8 and torch.equal(new.weight, codes.flatten())
    like = copy.deepcopy(layer)
    like.weight.copy_(codes * scale.view(-1, *(1,) * (codes.dim() - 1)))
    torch.testing.assert_close(new(x), like(x), rtol=0, atol=0)
    assert 0 < (new(x) - float_result).abs().max() < 0.02 * float_result.abs().max()


@torch.no_grad()
def test_the_scale_stays_float32_and_the_output_has_the_dtype_of_the_input():
    layer, x = seeded("linear"), input_for("linear").bfloat16()
    wanted, new = layer(x.float()), weight_only_in_place_of(layer)
    scale = new.weight_scale.clone()
    new.to(torch.bfloat16)
    assert torch.equal(new.weight_scale, scale) and new.bias.dtype == torch.bfloat16
    assert new.weight.dtype == torch.int8
    y = new(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_layer_of_4_bits_computes_with_its_codes(kind, monkeypatch):
    torch.manual_seed(1)
    layer, x = KINDS[kind](), input_for(kind)
    new = weight_only_in_place_of(layer, bits=4)
    rows = layer.weight.flatten(1)
    scale, zero_point = minmax_weight_range(rows, 4)
    assert new.weight.dtype == torch.int8 and new.weight.numel() == -(-rows.numel() // 2)
    assert torch.equal(new.weight_scale, scale)
    assert torch.equal(new.weight_zero_point, zero_point.to(torch.uint8))
    like = copy.deepcopy(layer)
    rounded = fake_quantize(rows, scale[:, None], zero_point[:, None], 4)
    like.weight.copy_(rounded.view_as(layer.weight))
    assert torch.equal(new(x), like(x))
    assert torch.equal(new.bfloat16().float_weight(torch.float32), like.weight)
    # A few out-channels at a time give the same.
    monkeypatch.setattr("stepquant.runtime.layers.weight_only.AT_ONCE", 1)
    for name, tensor in weight_only_tensors(layer.weight, 4).items():
        assert torch.equal(tensor, getattr(new, name))


def test_an_odd_number_of_codes_fills_the_last_byte_with_zeros():
    made = weight_only_tensors(torch.tensor([[0.0, 7.5, 15.0]]), 4)
    assert made["weight"].view(torch.uint8).tolist() == [8 << 4, 15]  # 7.5 to even


def test_an_empty_one_is_on_the_meta_device_with_the_right_shapes():
    new = weight_only_in_place_of(seeded("conv3x3"), empty=True)
    assert new.weight.is_meta and new.weight.dtype == torch.int8
    assert new.weight.shape == (8 * 12 * 3 * 3,) and new.weight_scale.shape == (8,)
    assert new.weight_zero_point is None
    new = weight_only_in_place_of(seeded("conv3x3"), empty=True, bits=4)
    assert new.weight.is_meta and new.weight.shape == (4 * 12 * 3 * 3,)
    assert new.weight_zero_point.shape == (8,) and new.weight_zero_point.dtype == torch.uint8
