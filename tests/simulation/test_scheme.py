from __future__ import annotations

import pytest
from pydantic import ValidationError
from torch import nn

from stepquant.models.unet2d import UNet2DAdapter
from stepquant.simulation.scheme import PROTOCOLS, Override, Scheme
from stepquant.support.errors import StepQuantError

ADAPTER = UNet2DAdapter()


def resolved(unet, **scheme):
    return Scheme(**scheme).layer_bits(unet, ADAPTER)


def override(pattern, weights=2, activations=6):
    return Override(pattern=pattern, weight_bits=weights, activation_bits=activations)


def test_strict_has_the_outer_convs_at_eight_bits_and_all_else_at_its_own(tiny_unet):
    unet = tiny_unet()
    bits, left_float = resolved(unet, weight_bits=3, activation_bits=5)
    assert left_float == {}
    assert bits.pop("conv_in") == bits.pop("conv_out") == (8, 8)
    assert set(bits.values()) == {(3, 5)}
    for part in (
        "time_embedding.linear_1",
        "down_blocks.0.resnets.0.time_emb_proj",
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.upsamplers.0.conv",
        "up_blocks.0.resnets.0.conv_shortcut",
        "mid_block.attentions.0.to_out.0",
    ):
        assert part in bits


def test_the_protocol_of_mpq_dm_leaves_out_what_its_code_does(tiny_unet):
    bits, left_float = resolved(tiny_unet(), weight_bits=3, protocol="paper:mpq-dm")
    assert set(left_float.values()) == {"protocol paper:mpq-dm"}
    assert left_float.keys() == {
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.resnets.0.conv_shortcut",
        "up_blocks.0.resnets.1.conv_shortcut",
        "up_blocks.1.resnets.0.conv_shortcut",
        "up_blocks.1.resnets.1.conv_shortcut",
    }
    eight = {name for name, value in bits.items() if value == (8, 8)}
    times = {"time_embedding.linear_1", "time_embedding.linear_2"}
    assert eight == {"conv_in", "conv_out"} | times
    assert "down_blocks.0.resnets.0.time_emb_proj" in bits


def test_every_conv_and_linear_has_bits(tiny_unet):
    unet = tiny_unet()
    bits, _ = resolved(unet)
    assert set(bits) == {
        name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("conv_out", {"conv_out"}),
        ("mid_block.attentions.?.to_[qk]", {"mid_block.attentions.0.to_" + x for x in "qk"}),
        ("time_embedding.*", {"time_embedding.linear_1", "time_embedding.linear_2"}),
    ],
)
def test_an_override_holds_for_the_layers_that_match(tiny_unet, pattern, matched):
    bits, _ = resolved(tiny_unet(), weight_bits=4, overrides=(override(pattern),))
    assert {name for name, value in bits.items() if value == (2, 6)} == matched


def test_of_several_overrides_the_last_that_matches_wins(tiny_unet):
    overrides = (override("conv_*", 5, 5), override("conv_in", 6, 6), override("*_in", 7, 7))
    bits, _ = resolved(tiny_unet(), overrides=overrides)
    assert bits["conv_out"] == (5, 5)
    assert bits["conv_in"] == (7, 7)


@pytest.mark.parametrize("pattern", ["Conv_in", "conv", "", "decoder.*"])
def test_a_pattern_that_matches_nothing_is_told(tiny_unet, pattern):
    overrides = (override("conv_in"), override(pattern))
    with pytest.raises(StepQuantError) as error:
        resolved(tiny_unet(), overrides=overrides)
    assert f"override pattern '{pattern}' matches no layer" in str(error.value)
    assert "such as 'conv_in'" in str(error.value)


@pytest.mark.parametrize("bits", [0, 9, -1, 4.0, "4", True, None])
@pytest.mark.parametrize("key", ["weight_bits", "activation_bits"])
def test_bits_out_of_range_are_refused(key, bits):
    expected = f"is {bits!r}: expected a whole number of bits from 1 to 8"
    with pytest.raises(ValidationError) as error:
        Scheme(**{key: bits})
    assert f"bits of the scheme {expected}" in str(error.value)
    values = {"pattern": "*", "weight_bits": 4, "activation_bits": 4, key: bits}
    with pytest.raises(ValidationError) as error:
        Override(**values)
    assert f"bits of an override {expected}" in str(error.value)


@pytest.mark.parametrize("bits", [0, 9, 4.0, "4", True])
@pytest.mark.parametrize("key", ["attention_bits", "probability_bits"])
def test_bits_of_attention_out_of_range_are_refused(key, bits):
    with pytest.raises(ValidationError) as error:
        Scheme(**{"attention_bits": 8, key: bits})
    assert f"is {bits!r}: expected a whole number of bits from 1 to 8" in str(error.value)


def test_products_of_attention_stay_float_unless_said():
    assert (Scheme().attention_bits, Scheme().probability_bits) == (None, 8)
    scheme = Scheme(attention_bits=4, probability_bits=3)
    assert Scheme(**scheme.model_dump(mode="json")) == scheme


def test_bits_of_probabilities_that_stay_float_are_refused():
    sentence = "probability_bits of the scheme is 4, but attention_bits leaves"
    with pytest.raises(ValidationError, match=sentence):
        Scheme(probability_bits=4)


def test_a_protocol_whose_products_stay_float_takes_no_bits_for_them():
    sentence = "attention_bits of the scheme is 8 under the protocol paper:mpq-dm, which leaves"
    with pytest.raises(ValidationError, match=sentence):
        Scheme(protocol="paper:mpq-dm", attention_bits=8)
    for protocol, description in PROTOCOLS.items():
        if "attention products float" not in description:
            assert Scheme(protocol=protocol, attention_bits=8).attention_bits == 8
        else:
            with pytest.raises(ValidationError, match=f"under the protocol {protocol}, which"):
                Scheme(protocol=protocol, attention_bits=8)


@pytest.mark.parametrize("bits", range(1, 9))
def test_one_to_eight_bits_are_taken(bits):
    scheme = Scheme(weight_bits=bits, activation_bits=9 - bits)
    assert scheme.label == f"w{bits}a{9 - bits}"


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ValidationError, match="unknown protocol 'loose': expected one of strict"):
        Scheme(protocol="loose")
    assert Scheme().protocol in PROTOCOLS


def test_an_unknown_key_is_refused():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Scheme(bits=4)


def test_a_scheme_survives_being_stored():
    scheme = Scheme(weight_bits=2, overrides=(override("conv_in"),))
    assert Scheme(**scheme.model_dump(mode="json")) == scheme


def test_layers_that_cannot_be_quantized_stay_float_with_the_reason(tiny_unet):
    unet = tiny_unet()
    unet.conv_act = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 16, 3, padding="same"),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(16, 16, 3, padding=1),
    )
    bits, left_float = resolved(unet, weight_bits=4)
    assert left_float == {
        "conv_act.0": "grouped conv (16 groups)",
        "conv_act.1": "padding 'same' of mode 'zeros'",
        "conv_act.2": "padding (1, 1) of mode 'circular'",
    }
    assert "conv_act.3" in bits
    assert not set(bits) & set(left_float)
    with pytest.raises(StepQuantError, match="matches no layer"):
        resolved(unet, overrides=(override("conv_act.0"),))
