"""Layers that find the scales of their activations at each call, against float64 arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from layer_cases import input_for, layers, seeded
from quantize_runs import refused
from stepquant.runtime.kernels import Choice
from stepquant.runtime.kernels.reference import REFERENCE
from stepquant.runtime.layers.dynamic import (
    DynamicConv2d,
    DynamicLinear,
    dynamic_codes,
)
from stepquant.runtime.layers.weight_only import weight_only_in_place_of

KINDS = (DynamicLinear, DynamicConv2d)


def dynamic(kind):
    return weight_only_in_place_of(seeded(kind).eval(), kinds=KINDS)


def whole_numbers(layer, x):
    """What the layer stands for, in float64: rounded input by rounded weight, and the bias."""
    dims = (-1,) if isinstance(layer, nn.Linear) else (1, 2, 3)
    scale = x.abs().amax(dim=dims, keepdim=True) / 127
    rounded = (x / scale).round().double() * scale.double()
    weight = layer.float_weight(torch.float32).double()
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        return functional.linear(rounded, weight, bias)
    return functional.conv2d(rounded, weight, bias, layer.stride, layer.padding, layer.dilation)


@layers
@torch.no_grad()
def test_a_layer_computes_with_rounded_input_and_weight(kind):
    layer, x = dynamic(kind), input_for(kind)
    wanted = whole_numbers(layer, x)
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)
    exact = seeded(kind)(x)
    assert float((layer(x) - exact).abs().max() / exact.abs().max()) < 0.03


@layers
@torch.no_grad()
def test_the_fast_kernel_agrees_with_the_reference(kind, monkeypatch):
    layer, x = dynamic(kind), input_for(kind)
    fast = layer(x)
    monkeypatch.setattr("stepquant.runtime.layers.dynamic.choose", lambda *_: Choice(REFERENCE, {}))
    layer.prepare()
    torch.testing.assert_close(fast, layer(x), rtol=1e-6, atol=1e-6)


@layers
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_neighbours(kind):
    """The batch size changes no image: a scale for each token, or each sample of a conv."""
    layer, x = dynamic(kind), input_for(kind)
    x[1] *= 50
    alone = torch.cat([layer(part) for part in x.split(1)])
    torch.testing.assert_close(layer(x), alone, rtol=1e-6, atol=1e-6)


def test_codes_are_symmetric_and_zeros_have_a_scale():
    x = torch.tensor([[-2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    codes, scale = dynamic_codes(x, (-1,))
    assert codes.dtype == torch.uint8 and codes.tolist() == [[1, 192, 128], [128, 128, 128]]
    torch.testing.assert_close(scale, torch.tensor([[2 / 127], [1.0]]))


@torch.no_grad()
def test_half_precision_goes_in_and_comes_out():
    layer, x = dynamic("linear"), input_for("linear").to(torch.bfloat16)
    scale = layer.weight_scale.clone()
    y = layer.to(torch.bfloat16)(x)
    assert y.dtype == torch.bfloat16 and torch.equal(layer.weight_scale, scale)


@torch.no_grad()
def test_copies_and_moves_lay_the_weight_out_anew():
    layer, x = dynamic("conv3x3"), input_for("conv3x3")
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    other = dynamic("conv3x3")
    other(x)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["weight"].neg_()
    other.load_state_dict(state)
    torch.testing.assert_close(other(x) + y, 2 * layer.bias.view(1, -1, 1, 1).expand_as(y))
    assert {t.device.type for t in other.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("kinds", [KINDS, None], ids=["dynamic", "weight-only"])
def test_an_input_cast_to_the_codes_dtype_is_told(kinds):
    """Some models cast to `linear.weight.dtype`."""
    more = {} if kinds is None else {"kinds": kinds}
    layer = weight_only_in_place_of(nn.Linear(4, 4), **more)
    message = refused(lambda: layer(torch.ones(1, 4).to(layer.weight.dtype)))
    assert "a weight-only layer got an input of torch.int8" in message
