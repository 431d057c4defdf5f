from __future__ import annotations

import pytest
from torch import nn

from architectures import condition_unet, wan_transformer
from stepquant.models.eligibility import (
    check_patterns,
    matches,
    modules_kept_float,
    shared_weights,
    unmatched,
    why_float,
)
from stepquant.support.errors import StepQuantError
from stepquant.weight_only.config import DynamicConfig, WeightOnlyConfig


class Named(nn.Linear):
    """Computes as its parent."""


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "module",
    [nn.Linear(2, 3), nn.Conv2d(2, 3, (1, 3), stride=2, padding=(0, 1), dilation=2)],
    ids=["linear", "conv"],
)
def test_plain_layers_can_be_quantized(module):
    assert why_float(module) is None
    assert why_float(module, any_conv=True, subclasses=True, shared={1}) is None


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), "grouped conv (2 groups)"),
        (nn.Conv2d(8, 8, 3, padding="same"), "padding 'same' of mode 'zeros'"),
        (
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
            "padding (1, 1) of mode 'reflect'",
        ),
    ],
    ids=["groups", "same", "reflect"],
)
def test_convs_that_no_integer_kernel_takes_are_for_float_arithmetic_only(module, reason):
    assert why_float(module) == reason
    assert why_float(module, any_conv=True) is None
    assert WeightOnlyConfig.takes(module) and not DynamicConfig.takes(module)


@pytest.mark.parametrize("module", [nn.Conv1d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.SiLU()])
def test_other_modules_stay_float(module):
    assert why_float(module, any_conv=True) == f"layer of the class {type(module).__name__}"


def test_a_subclass_is_taken_where_it_is_asked_for_and_has_no_forward_of_its_own():
    assert why_float(Named(2, 2)) == "layer of the class Named"
    assert why_float(Named(2, 2), subclasses=True) is None
    assert why_float(Own(2, 2), subclasses=True) == "layer of the class Own"


def test_a_weight_of_two_modules_is_no_layers_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    model.add_module("again", model[2])  # one module in two places
    assert shared_weights(model) == set()
    model[1].weight = model[0].weight
    shared = shared_weights(model)
    reasons = [why_float(module, shared=shared) for module in list(model)[:3]]
    assert reasons == ["layer that shares its weight"] * 2 + [None]


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("time_embedder", True),
        ("blocks.0", True),
        ("blocks.0.time_embedder.to_q", True),
        ("blocks.*.to_q", True),
        ("to_?", True),
        ("0.time_embedder", True),
        ("time", False),
        ("blocks.1", False),
        ("locks.0", False),
        ("to_k", False),
    ],
)
def test_a_pattern_names_whole_parts_of_a_name(pattern, matched):
    assert matches("blocks.0.time_embedder.to_q", pattern) == matched


def test_what_a_class_keeps_in_float32_is_kept_float():
    found = modules_kept_float(wan_transformer())
    embedder = "condition_embedder.time_embedder"
    assert set(found) == {f"{embedder}.linear_1", f"{embedder}.linear_2"}
    assert set(found.values()) == {"WanTransformer3DModel keeps 'time_embedder' in float32"}
    assert modules_kept_float(condition_unet()) == {}


def test_what_a_user_keeps_is_listed_with_the_pattern():
    found = modules_kept_float(condition_unet(), ["conv_out", "mid_block.*.conv?"])
    assert found["conv_out"] == "modules_to_not_convert has 'conv_out'"
    names = {f"mid_block.resnets.{i}.conv{j}" for i in (0, 1) for j in (1, 2)}
    assert set(found) == {"conv_out", *names}
    assert unmatched(condition_unet(), ["conv_out", "encoder", "mid_block"]) == ["encoder"]


@pytest.mark.parametrize("bad", ["conv_out", 3, [""], [None], {"a": 1}])
def test_patterns_are_a_list_of_texts(bad):
    with pytest.raises(StepQuantError, match="expected a list of names or patterns of modules"):
        check_patterns(bad, "it")
