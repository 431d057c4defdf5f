"""A declared tensor is constructed, packed, described, checked, and refused by what ignores it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from stepquant.checkpoint.layer_config import LayerConfig
from stepquant.checkpoint.validate import check_tensor
from stepquant.runtime.layers import layer_tensors
from stepquant.runtime.layers.integer import IntegerLinear
from stepquant.runtime.layers.layer_tensors import (
    IN_CONFIG,
    LAYER_TENSORS,
    LayerTensor,
    Reader,
    Values,
    not_read,
)
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.simulation.packing import pack_layer
from stepquant.support.errors import StepQuantError
from stepquant.support.refusal import RefusalCode

PAGE = Path(__file__).parents[3] / "docs/reference/checkpoint-format.md"
SPEC = LayerSpec("linear", 12, 8, 4, 8)


@pytest.fixture
def offset(monkeypatch):
    """One more optional tensor, which only the layer itself reads."""
    tensor = LayerTensor(
        "act_channel_offset",
        torch.float32,
        lambda sizes: (sizes.spec.in_channels,),
        "subtracted from the input",
        Values.NUMBERS,
        config_key="channel_offset",
    )
    monkeypatch.setitem(LAYER_TENSORS, tensor.name, tensor)
    monkeypatch.setitem(IN_CONFIG, "channel_offset", tensor)
    return tensor


def layer_with(context, *optional):
    return IntegerLinear(SPEC, (7, 5), 5, context, optional)


def test_the_format_page_lists_every_tensor_and_key():
    text = PAGE.read_text()
    assert [name for name in LAYER_TENSORS if f"`L.{name}`" not in text] == []
    assert [key for key in IN_CONFIG if f"| `{key}`" not in text] == []


def test_layers_have_what_their_spec_needs_and_what_they_are_told(context):
    plain = layer_with(context)
    assert plain.present() == [
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "act_scale",
        "act_zero_point",
    ]
    assert list(plain.state_dict()) == plain.present()
    full = layer_with(context, "bias", "step_bias", "act_channel_scale")
    shapes = {name: tuple(tensor.shape) for name, tensor in full.state_dict().items()}
    assert shapes == {
        "weight_packed": (8 * 7 // 2 + 8 * 5 // 2,),
        "weight_scale": (2, 8),
        "weight_zero_point": (2, 8),
        "act_scale": (2, 5),
        "act_zero_point": (2, 5),
        "bias": (8,),
        "step_bias": (5, 8),
        "act_channel_scale": (12,),
    }


def test_every_tensor_of_the_first_format_is_read_by_all():
    for reader in Reader:
        assert not_read(LAYER_TENSORS, reader) == []


def test_a_new_tensor_is_constructed_described_and_rebuilt(offset, context):
    layer = layer_with(context, "bias", offset.name)
    assert layer.act_channel_offset.tolist() == [0.0] * 12
    entry = LayerConfig.of(layer)
    values = entry.to_dict()
    assert values["channel_offset"] is True
    assert "channel_offset" not in LayerConfig.of(layer_with(context)).to_dict()
    assert LayerConfig.from_dict("layer", values) == entry
    again = entry.packed_in_place_of("layer", nn.Linear(12, 8), context)
    assert again.state_dict().keys() == layer.state_dict().keys()


def test_a_new_tensor_is_packed_if_the_simulated_layer_has_it(offset, simulate):
    layer = simulate(nn.Linear(12, 8), 4)
    own = layer.optional_tensors()
    layer.optional_tensors = lambda: {**own, offset.name: torch.arange(12.0)}
    packed = pack_layer(layer)
    assert torch.equal(packed.act_channel_offset, torch.arange(12.0))


def test_the_values_of_a_new_tensor_are_checked(offset, context):
    model = nn.Sequential(layer_with(context, offset.name))
    with pytest.raises(StepQuantError, match=r"'0\.act_channel_offset' has shape \(3,\)"):
        check_tensor("0.act_channel_offset", torch.zeros(3), model)
    with pytest.raises(StepQuantError, match=r"holds nan at \[0\]: expected finite numbers"):
        check_tensor("0.act_channel_offset", torch.full((12,), torch.nan), model)
    check_tensor("0.act_channel_offset", torch.full((12,), -3.0), model)


def test_fast_code_refuses_a_tensor_that_it_does_not_read(offset, context):
    refusal = layer_with(context, offset.name).why_no_codes()
    assert refusal is not None
    assert refusal.code is RefusalCode.TENSOR
    assert str(refusal) == "the layer's tensor act_channel_offset"


def test_the_table_is_keyed_by_name():
    assert all(name == tensor.name for name, tensor in LAYER_TENSORS.items())
    assert layer_tensors.names_of(SPEC, ()) == [
        name for name, tensor in LAYER_TENSORS.items() if tensor.needed and name != "channel_bits"
    ]
