"""Layers that peft has wrapped are recognized without peft, and by the names of saved tensors."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from quantize_runs import refused
from stepquant.runtime.layers.adapters import (
    adapted_layer,
    adapters_text,
    check_no_adapter_tensors,
    named_adapters,
    without_adapter,
)


def test_layers_of_peft_and_others() -> None:
    peft: Any = pytest.importorskip("peft", reason="peft is not installed")
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first, second = net
    config = peft.LoraConfig(r=2, target_modules=["1"])
    peft.inject_adapter_in_model(config, net, "a")
    assert adapted_layer(net[0]) is None and without_adapter(net[0]) is first
    assert adapted_layer(net[1]) is second and without_adapter(net[1]) is second
    assert named_adapters(net) == [("1", ["a"])]
    assert "'1' for a LoRA" in refused(lambda: check_no_adapter_tensors(net.state_dict()))
    net[1].delete_adapter("a")
    assert named_adapters(net) == [("1", [])]


def test_a_module_of_ones_own_with_a_base_layer_is_no_adapter() -> None:
    module = nn.Module()
    module.base_layer = nn.Linear(2, 2)
    assert adapted_layer(module) is None and without_adapter(module) is module


def test_adapters_in_sentences() -> None:
    assert adapters_text(["a"]) == "the adapter 'a'"
    assert adapters_text(["a", "b"]) == "the adapters 'a', 'b'"
    assert adapters_text([]) == "an empty adapter layer"
