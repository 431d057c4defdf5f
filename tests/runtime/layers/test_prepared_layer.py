"""A prepared layer from its codes on gives what the layer gives for floats."""

from __future__ import annotations

import pytest
import torch

from layer_cases import input_for, layers, seeded
from stepquant.runtime.kernels.onednn import ONEDNN
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.simulation.packing import pack_layer
from stepquant.support.refusal import Refusal, RefusalCode

NO_ONEDNN = ONEDNN.why_not(LayerSpec("linear", 8, 8, 4, 4), torch.device("cpu"))
# Without VNNI too: two products of 4 bits do not saturate.
pytestmark = pytest.mark.skipif(NO_ONEDNN is not None, reason=str(NO_ONEDNN))


@layers
@pytest.mark.parametrize("splits", [None, (7, 5)], ids=["whole", "parts"])
@torch.no_grad()
def test_codes_and_floats_give_the_same(kind, splits, simulate):
    layer, x = pack_layer(simulate(seeded(kind), 4, 4, splits)), input_for(kind)
    layer.context.set_timestep(20)
    prepared = layer.prepared()
    assert layer.why_no_codes() is None
    codes = prepared.encode(x)
    assert len(codes) == len(layer.splits)
    y = prepared.run(codes)
    assert torch.equal(y, layer(x))
    floats = prepared.run_floats(x, layer.bias, layer.step_bias)
    torch.testing.assert_close(y, floats, rtol=1e-5, atol=1e-6)
    added = torch.ones_like(y)
    torch.testing.assert_close(prepared.run(codes, added), y + 1)
    assert bool((added == 1).all())
    assert prepared.run(codes, dtype=torch.bfloat16).dtype == torch.bfloat16


@torch.no_grad()
def test_inputs_in_parts_are_encoded_without_joining_them(simulate):
    layer, x = pack_layer(simulate(seeded("conv3x3"), 4, 4, (7, 5))), input_for("conv3x3")
    prepared = layer.prepared()
    expected = prepared.encode(x)
    for sizes in ([7, 5], [4, 8], [12]):
        for code, joined in zip(prepared.encode_parts(x.split(sizes, 1)), expected, strict=True):
            assert torch.equal(code, joined)
    starts = [(each.start, each.channels) for each in prepared.outputs()]
    assert starts == [(0, 7), (7, 5)]


@torch.no_grad()
def test_grids_follow_the_step_and_stay_while_it_does(simulate):
    layer = pack_layer(simulate(seeded("linear"), 4, 4))
    layer.context.set_timestep(20)
    first = layer.prepared().grid()
    layer.context.set_timestep(40)
    second = layer.prepared().grid()
    assert second is not first and not torch.equal(second.in_force()[0], first.in_force()[0])
    assert layer.prepared().grid().in_force()[0] == second.in_force()[0]


@torch.no_grad()
def test_why_a_layer_is_not_run_on_codes(simulate):
    layer = pack_layer(simulate(seeded("linear"), 4, 4))
    layer.context.set_timestep(torch.tensor([0, 20]))
    apart = Refusal(RefusalCode.TIMESTEPS, "samples at different timesteps")
    assert layer.why_no_codes() == apart
    layer.context.set_timestep(20)
    assert layer.why_no_codes() is None
    layer.backend = "onednn"
    assert layer.why_no_codes() == Refusal(RefusalCode.BACKEND, "the backend 'onednn'")


@torch.no_grad()
def test_a_bias_that_was_replaced_is_seen(simulate):
    layer, x = pack_layer(simulate(seeded("linear"), 4, 4)), input_for("linear")
    before = layer(x)
    layer.bias = layer.bias + 1
    torch.testing.assert_close(layer(x), before + 1)
