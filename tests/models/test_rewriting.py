"""Rewritten convolutions against the layers that they stand for, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stepquant.models.rewriting import (
    class_for,
    name_before,
    names_of_rewritten,
    rewrite,
    with_rewritten,
    without_rewritten,
)
from stepquant.models.rewritten_conv import RewrittenConv
from stepquant.support.errors import StepQuantError

CHANNELS = 128
SIZES = (9, 8, 7)
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}


def assert_stands_for(layer: Any, x: Tensor) -> None:
    kind = class_for(layer)
    assert kind is not None
    made = kind(layer)
    assert all(type(conv) is nn.Conv2d for conv in made.convs)
    assert all(conv.groups == 1 and conv.padding_mode == "zeros" for conv in made.convs)
    torch.testing.assert_close(made(x), layer(x), rtol=0, atol=1e-12)
    if made.arguments["padding_mode"] == "zeros":  # torch pads no single sample otherwise
        torch.testing.assert_close(made(x[0]), layer(x[0]), rtol=0, atol=1e-12)
    assert torch.equal(made.weight, layer.weight) and made.kernel_size == layer.kernel_size
    again: Any = made.original()
    assert type(again) is type(layer) and str(again) == str(layer)
    assert torch.equal(again.weight, layer.weight)
    assert layer.bias is None or torch.equal(again.bias, layer.bias)


def works(layer: nn.Module, x: Tensor) -> bool:
    """Whether torch computes it: padding may be longer than the input, the kernel larger."""
    try:
        layer(x)
    except (RuntimeError, ValueError):
        return False
    return True


@settings(max_examples=120)
@given(data=st.data(), dims=st.sampled_from([1, 2, 3]))
def test_convolutions(data: st.DataObject, dims: int) -> None:
    def sizes(*values: int) -> tuple[int, ...]:
        return data.draw(st.tuples(*[st.sampled_from(values)] * dims))

    padding = data.draw(st.sampled_from(["same", "valid", "numbers"]))
    try:
        layer = CONVS[dims](
            *(CHANNELS, CHANNELS, sizes(1, 2, 3, 4)),
            stride=sizes(1) if padding == "same" else sizes(1, 2, 3),
            padding=sizes(0, 1, 2) if padding == "numbers" else padding,
            dilation=sizes(1, 2),
            groups=data.draw(st.sampled_from([1, 2])),
            bias=data.draw(st.booleans()),
            padding_mode=data.draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"])),
        ).double()
    except NotImplementedError:
        assume(False)
    x = torch.randn(2, CHANNELS, *SIZES[:dims], dtype=torch.float64)
    assume(works(layer, x) and class_for(layer) is not None)
    assert_stands_for(layer, x)


@settings(max_examples=120)
@given(data=st.data(), dims=st.sampled_from([1, 2]))
def test_transposed_convolutions(data: st.DataObject, dims: int) -> None:
    def sizes(*values: int) -> tuple[int, ...]:
        return data.draw(st.tuples(*[st.sampled_from(values)] * dims))

    strides = sizes(1, 2, 3)
    kernel = tuple(s * taps for s, taps in zip(strides, sizes(1, 2, 3), strict=True))
    layer = TRANSPOSED[dims](
        *(CHANNELS, CHANNELS, kernel, strides, sizes(0, 1, 2), sizes(0, 0, 1)),
        groups=data.draw(st.sampled_from([1, 2])),
        bias=data.draw(st.booleans()),
    ).double()
    x = torch.randn(2, CHANNELS, *SIZES[:dims], dtype=torch.float64)
    assume(works(layer, x) and class_for(layer) is not None)
    assert_stands_for(layer, x)


def test_a_transposed_convolution_by_hand() -> None:
    layer = nn.ConvTranspose1d(1, 1, 4, stride=2, padding=1, output_padding=1)
    layer.weight.data.copy_(torch.tensor([[[1.0, 10.0, 100.0, 1000.0]]]))
    layer.bias.data.fill_(0.5)
    kind = class_for(layer)
    assert kind is not None
    # 1, 10, 100, 1000 from place 0 and twice that from place 2; the padding takes place 0 off.
    found = kind(layer)(torch.tensor([[[1.0, 2.0]]]))
    assert found.tolist() == [[[10.5, 102.5, 1020.5, 200.5, 2000.5]]]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Conv2d(64, 64, 3, groups=64),
        nn.Conv2d(64, 64, 3, groups=2),
        nn.ConvTranspose2d(64, 64, 2, dilation=2),
        nn.ConvTranspose2d(64, 64, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(64, 64, 2, stride=2, output_padding=1),
        nn.ConvTranspose3d(64, 64, 2),
        nn.Linear(64, 64),
        nn.LazyConv2d(64, 3, padding_mode="reflect"),
    ],
    ids=str,
)
def test_layers_that_stay_what_they_are(layer: nn.Module) -> None:
    assert class_for(layer) is None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lines = nn.Conv1d(64, 64, 3, padding=1)
        self.up = nn.ConvTranspose1d(64, 64, 4, 2, 1)
        self.shared = nn.Conv1d(64, 64, 1)
        self.twin = nn.Conv1d(64, 64, 1)
        self.twin.weight = self.shared.weight
        self.alias = self.up

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(self.alias(self.shared(self.up(self.lines(x)))))


def test_a_model_is_rewritten_in_a_copy_that_shares_its_tensors() -> None:
    model, x = Net(), torch.randn(2, 64, 8)
    made = with_rewritten(model)
    assert names_of_rewritten(made) == ["lines", "up"]
    assert type(model.up) is nn.ConvTranspose1d and made.alias is made.up
    torch.testing.assert_close(made(x), model(x))
    assert name_before(made, "up.convs.0") == "up" and name_before(made, "twin") == "twin"
    assert made.twin.weight.data_ptr() == model.twin.weight.data_ptr()
    restored = without_rewritten(copy.deepcopy(made))
    assert str(restored) == str(model) and torch.equal(restored(x), model(x))
    assert names_of_rewritten(with_rewritten(model, ["up"])) == ["lines"]
    plain = nn.Sequential(nn.Conv2d(3, 3, 1))
    assert with_rewritten(plain) is plain


@pytest.mark.parametrize("name", ["twins", "shared.weight", ""])
def test_a_name_that_is_no_such_layer_is_refused(name: str) -> None:
    with pytest.raises(StepQuantError, match=f"rewrites the layer '{name}'"):
        rewrite(Net(), [name])


def test_a_size_of_the_result_is_refused() -> None:
    layer = nn.ConvTranspose1d(64, 64, 4, 2, 1)
    kind = class_for(layer)
    assert kind is not None and issubclass(kind, RewrittenConv)
    with pytest.raises(StepQuantError, match=r"called with output_size=\[16\]"):
        kind(layer)(torch.zeros(1, 64, 8), output_size=[16])


@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
def test_a_layer_that_somebody_changed_stays_what_it_is(how: str) -> None:
    layer = nn.Conv1d(64, 64, 3)
    if how == "hook":
        layer.register_forward_hook(lambda module, args, output: output * 0)
    elif how == "pre-hook":
        layer.register_forward_pre_hook(lambda module, args: args)
    else:
        layer.forward = lambda x: x  # type: ignore[method-assign]
    assert class_for(layer) is None
