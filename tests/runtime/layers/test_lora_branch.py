"""Float branches beside packed and float layers, against the product of the matrices in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layer_cases import input_for, layers, seeded
from lora_files import RANK, matrices
from stepquant.runtime.layers.lora_branch import (
    LoraBranch,
    attach_branch,
    branches_of,
    detach_branch,
    named_branches,
)
from stepquant.simulation.packing import pack_layer

TIMES = (0, 20, 40)


def branch_for(layer: nn.Module, factor: float = 1.0, scale: float = 1.0) -> LoraBranch:
    tensors = matrices(nn.ModuleDict({"one": layer}), ["one"])
    return LoraBranch(*tensors.values(), factor, scale)


def product(layer: nn.Module, branch: LoraBranch, x: torch.Tensor) -> torch.Tensor:
    """`B A x` in float64: one layer of the same kind with the weight `B A`."""
    weight = branch.B.flatten(1).double() @ branch.A.flatten(1).double()
    weight = weight.view(layer.weight.shape)
    if isinstance(layer, nn.Linear):
        return F.linear(x.double(), weight)
    return F.conv2d(x.double(), weight, None, layer.stride, layer.padding, layer.dilation)


@layers
@torch.no_grad()
def test_a_packed_layer_gains_the_product_of_the_matrices(kind, simulate):
    layer, x = seeded(kind), input_for(kind)
    packed = pack_layer(simulate(layer, 4, 8))
    names = set(packed.state_dict())
    without = {}
    for time in TIMES:
        packed.context.set_timestep(time)
        without[time] = packed(x)

    branch = branch_for(layer, factor=2.0, scale=0.75)
    attach_branch(packed, "style", branch)
    assert set(packed.state_dict()) == names
    for time in TIMES:
        packed.context.set_timestep(time)
        gained = packed(x).double() - without[time].double()
        torch.testing.assert_close(gained, 1.5 * product(layer, branch, x), rtol=1e-5, atol=1e-5)

    detach_branch(packed, "style")
    assert branches_of(packed) is None and packed.lora is None
    for time in TIMES:
        packed.context.set_timestep(time)
        assert torch.equal(packed(x), without[time])


@layers
@torch.no_grad()
def test_rows_of_several_steps_in_one_batch(kind, simulate):
    layer, x = seeded(kind), input_for(kind)
    packed = pack_layer(simulate(layer, 4, 8))
    packed.context.set_timestep(torch.tensor([0.0, 20.0, 40.0]))
    without, branch = packed(x), branch_for(layer)
    attach_branch(packed, "style", branch)
    gained = packed(x).double() - without.double()
    torch.testing.assert_close(gained, product(layer, branch, x), rtol=1e-5, atol=1e-5)


@layers
@torch.no_grad()
def test_a_float_layer_too_and_nothing_of_it_stays(kind):
    layer, x = seeded(kind), input_for(kind)
    before, attributes, without = dict(layer.state_dict()), set(dir(layer)), layer(x)
    branch = branch_for(layer, scale=-0.5)
    attach_branch(layer, "style", branch)
    gained = layer(x).double() - without.double()
    torch.testing.assert_close(gained, -0.5 * product(layer, branch, x), rtol=1e-5, atol=1e-5)
    assert set(layer.state_dict()) == set(before)
    detach_branch(layer, "style")
    assert torch.equal(layer(x), without)
    assert set(dir(layer)) == attributes and not layer._forward_hooks


@torch.no_grad()
def test_several_branches_add_up_and_leave_one_by_one(simulate):
    layer, x = seeded("linear"), input_for("linear")
    packed = pack_layer(simulate(layer, 4, 8))
    packed.context.set_timestep(0)
    without = packed(x)
    branches = {name: branch_for(layer, scale=scale) for name, scale in (("a", 1.0), ("b", -3.0))}
    for name, branch in branches.items():
        attach_branch(packed, name, branch)
    wanted = sum(branch.scale * product(layer, branch, x) for branch in branches.values())
    torch.testing.assert_close((packed(x) - without).double(), wanted, rtol=1e-4, atol=1e-5)
    detach_branch(packed, "a")
    wanted = -3.0 * product(layer, branches["b"], x)
    torch.testing.assert_close((packed(x) - without).double(), wanted, rtol=1e-4, atol=1e-5)
    assert [found[2] for found in named_branches(packed)] == ["b"]


@pytest.mark.parametrize("name", ["keys", "forward", "A"])
def test_a_lora_may_be_called_like_an_attribute(name, simulate):
    packed = pack_layer(simulate(seeded("linear"), 4, 8))
    attach_branch(packed, name, branch_for(seeded("linear")))
    assert [found[2] for found in named_branches(packed)] == [name]
    detach_branch(packed, name)


@torch.no_grad()
def test_scale_zero_changes_no_bit(simulate):
    packed, x = pack_layer(simulate(seeded("linear"), 4, 8)), input_for("linear")
    packed.context.set_timestep(0)
    without = packed(x)
    branch = branch_for(seeded("linear"), scale=0.0)
    branch.A.fill_(torch.nan)  # it is not even computed
    attach_branch(packed, "style", branch)
    assert torch.equal(packed(x), without)


@pytest.mark.parametrize("kind", ["packed", "float"])
@torch.no_grad()
def test_a_copy_has_branches_of_its_own(kind, simulate):
    x, layer = input_for("linear"), seeded("linear")
    one = pack_layer(simulate(layer, 4, 8)) if kind == "packed" else layer
    if kind == "packed":
        one.context.set_timestep(0)
    without = one(x)
    attach_branch(one, "style", branch_for(layer))
    other, changed = copy.deepcopy(one), one(x)
    assert torch.equal(other(x), changed)
    detach_branch(other, "style")
    assert torch.equal(other(x), without) and torch.equal(one(x), changed)


@torch.no_grad()
def test_matrices_of_a_packed_layer_stay_float32_and_the_output_keeps_its_dtype(simulate):
    layer, x = seeded("linear"), input_for("linear").bfloat16()
    packed = pack_layer(simulate(layer, 4, 8))
    packed.context.set_timestep(0)
    branch = branch_for(layer)
    without = packed(x)
    attach_branch(packed, "style", branch)
    packed.to(torch.bfloat16)
    assert branch.A.dtype == branch.B.dtype == torch.float32
    y = packed(x)
    assert y.dtype == torch.bfloat16
    wanted = without.double() + product(layer, branch, x)
    torch.testing.assert_close(y.double(), wanted, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_a_compiled_layer_notices_what_is_loaded_scaled_and_unloaded(simulate):
    layer, x = seeded("linear"), input_for("linear")
    packed = pack_layer(simulate(layer, 4, 8))
    packed.context.set_timestep(0)
    compiled, without = torch.compile(packed, backend="eager"), packed(x)
    torch.testing.assert_close(compiled(x), without)
    branch = branch_for(layer)
    attach_branch(packed, "style", branch)
    for scale in (1.0, 2.0, 0.0):
        branch.scale = scale
        wanted = scale * product(layer, branch, x)
        gained = (compiled(x) - without).double()
        torch.testing.assert_close(gained, wanted, rtol=1e-4, atol=1e-5)
    detach_branch(packed, "style")
    torch.testing.assert_close(compiled(x), without, rtol=0, atol=1e-6)
    assert branch.A.shape[0] == RANK
