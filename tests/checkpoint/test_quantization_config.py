"""The quantization config: what it writes, what it reads back, what it refuses."""

import json

import pytest

from stepquant.checkpoint.config import StepQuantConfig
from stepquant.checkpoint.layer_config import LayerConfig
from stepquant.support.errors import StepQuantError

LAYERS = {
    "b": LayerConfig("conv2d", 4, 8, steps=5),
    "a": LayerConfig("linear", 4, 8, steps=5, splits=(3, 1), channel_scale=True),
    "c": LayerConfig("conv2d", 8, 8),
}


def config(**changes) -> StepQuantConfig:
    values = {
        "scheme": {"weight_bits": 4, "activation_bits": 8, "protocol": "strict"},
        "layers": LAYERS,
        "float_layers": {"z": "too small"},
        "recipe": {"steps": [{"kind": "minmax"}]},
        "provenance": {"seed": 0, "versions": {"torch": "2.13"}},
        "steps": 5,
    }
    return StepQuantConfig(**{**values, **changes})


def test_to_dict_and_back_is_equal_through_json():
    values = json.loads(json.dumps(config().to_dict()))
    again = StepQuantConfig.from_dict(values)
    assert again == config()
    assert again.layers == LAYERS
    assert again.quant_method.value == "stepquant"


def test_layers_hold_only_what_differs_from_the_default():
    values = config().to_dict()
    assert values["layer_default"] == {
        "kind": "conv2d",
        "weight_bits": 4,
        "activation_bits": 8,
        "steps": 5,
        "splits": None,
        "channel_scale": False,
        "channel_counts": None,
        "half_zero_points": False,
    }
    assert values["layers"]["b"] == {}
    assert values["layers"]["c"] == {"weight_bits": 8, "steps": 1}


def test_json_does_not_depend_on_the_order_of_anything():
    shuffled = config(
        layers=dict(reversed(LAYERS.items())),
        provenance={"versions": {"torch": "2.13"}, "seed": 0},
    )
    assert json.dumps(shuffled.to_dict()) == json.dumps(config().to_dict())
    assert shuffled.layers_json() == config().layers_json()


def test_repr_is_one_line():
    assert repr(config()) == (
        "StepQuantConfig(format_version=1, scheme={'weight_bits': 4, 'activation_bits': 8, "
        "'protocol': 'strict'}, layers=3, float_layers=1, steps=5)"
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format_version": 2}, "has format version 2: expected at most 1.*upgrade stepquant"),
        ({"format_version": 2, "new": 1}, "has format version 2"),
        ({"format_version": "1"}, "format_version .* is '1': expected a whole number"),
        ({"bits": 4}, "unknown key 'bits': expected format_version, scheme"),
        ({"steps": 0}, "steps of the quantization config is 0: expected the length"),
        ({"steps": 7}, "steps of layer 'b' .* is 5: expected 7"),
        ({"scheme": [4]}, r"scheme of the quantization config is \[4\]: expected an object"),
        ({"recipe": {"a": object()}}, "recipe .* has a value that JSON cannot express"),
        ({"provenance": {"a": float("nan")}}, "provenance .* has a value that JSON cannot express"),
        ({"layers": ["a"]}, r"layers of the quantization config is \['a'\]"),
        ({"layers": {"a": {"weight_bits": 4}}}, "layer 'a' .* has no key 'activation_bits'"),
        ({"layers": {"a": {"bits": 4}}}, "layer 'a' .* has the unknown key 'bits'"),
    ],
)
def test_bad_values_are_told_in_a_sentence(changes, sentence):
    with pytest.raises(StepQuantError, match=sentence):
        config(**changes)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("kind", "conv3d", "kind of layer 'a' .* is 'conv3d': expected one of linear, conv2d"),
        ("weight_bits", 9, "weight_bits of layer 'a' .* is 9"),
        ("activation_bits", "8", "activation_bits of layer 'a' .* is '8'"),
        ("steps", 0, "steps of layer 'a' .* is 0"),
        ("splits", [3, 0], r"splits of layer 'a' .* is \[3, 0\]"),
        ("channel_scale", "yes", "channel_scale of layer 'a' .* is 'yes'"),
        ("step_bias", 1, "step_bias of layer 'a' .* is 1: expected true or false"),
        ("half_zero_points", 1, "half_zero_points of layer 'a' .* is 1: expected true or false"),
        ("channel_counts", {"3": 2}, "channel_counts of layer 'a' .* is {'3': 2}: expected a list"),
        ("channel_counts", [[4, 8]], r"channel_counts of layer 'a' .* is \[\[4, 8\]\]"),
        ("channel_counts", [[4, 8], [3, 2]], "bits ascending to weight_bits"),
        ("channel_counts", [[3, 8], [5, 2]], r"bits ascending to weight_bits \(4\)"),
        ("channel_counts", [[3, 8], [4, 0]], "channel_counts of layer 'a'"),
    ],
)
def test_bad_layer_values_are_told_in_a_sentence(key, value, sentence):
    values = {**LAYERS["a"].to_dict(), key: value}
    with pytest.raises(StepQuantError, match=sentence):
        config(layers={"a": values})


def test_half_zero_points_of_many_bits_are_refused():
    values = {**LAYERS["a"].to_dict(), "weight_bits": 7, "half_zero_points": True}
    with pytest.raises(StepQuantError, match=r"half_zero_points .* expected false for more than 6"):
        config(layers={"a": values})
