"""What is evaluated is what runs: packed layers against the simulation they come from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fast_models import best_kernel
from layer_cases import Denoiser, assert_agrees, input_for, layers, seeded
from stepquant.numerics import quantize
from stepquant.quantizers import QuantLinear, StepContext
from stepquant.runtime.kernels import onednn
from stepquant.runtime.layers import integer
from stepquant.runtime.layers.integer import IntegerLinear
from stepquant.runtime.ops.encoding import encode
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.simulation.packing import pack_layer
from stepquant.support.errors import StepQuantError

LINEAR = LayerSpec("linear", 12, 8, 4, 8)
NO_ONEDNN = onednn.ONEDNN.why_not(LINEAR, torch.device("cpu"))

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@layers
@pytest.mark.parametrize(
    ("weight_bits", "activation_bits"), [(8, 8), (4, 8), (3, 6), (2, 4), (1, 1)], ids=str
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@torch.no_grad()
def test_packed_agrees_with_the_simulation_at_every_step(
    kind: str, weight_bits: int, activation_bits: int, backend: str, simulate: Any
) -> None:
    layer = simulate(seeded(kind), weight_bits, activation_bits)
    packed = pack_layer(layer)
    packed.backend = backend
    results = []
    for timestep in (0, 10, 20, 30, 40):
        layer.context.set_timestep(timestep)
        results.append(packed(input_for(kind)))
        simulated = layer(input_for(kind))
        assert_agrees(results[-1], simulated)
        assert backend != "reference" or torch.equal(results[-1], simulated)
    if activation_bits > 1:
        assert not any(torch.equal(results[i], results[j]) for i in range(5) for j in range(i))


@layers
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("splits", [(12,), (7, 5), (3, 1, 8)], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "channel-scale"])
@torch.no_grad()
def test_split_and_scaled_inputs_agree_with_the_simulation(
    kind: str, backend: str, splits: tuple[int, ...], scaled: bool, simulate: Any
) -> None:
    layer = simulate(seeded(kind), 4, 8, splits)
    if scaled:
        scale = torch.rand(12, generator=torch.Generator().manual_seed(8)) * 4 + 0.1
        layer.multiply_channel_scale(scale)
    packed = pack_layer(layer)
    packed.backend = backend
    layer.context.set_timestep(30)
    assert (packed.act_channel_scale is not None) == scaled
    result, simulated = packed(input_for(kind)), layer(input_for(kind))
    assert_agrees(result, simulated)
    assert backend != "reference" or torch.equal(result, simulated)


@layers
@torch.no_grad()
def test_a_mixed_batch_equals_its_samples_one_by_one(kind: str, simulate: Any) -> None:
    layer = simulate(seeded(kind), 4, 8, (7, 5))
    packed, x = pack_layer(layer), input_for(kind, 5)
    timesteps = [40, 0, 40, 20, 0]
    layer.context.set_timestep(torch.tensor(timesteps))
    mixed = packed(x)
    assert_agrees(mixed, layer(x))
    for index, timestep in enumerate(timesteps):
        layer.context.set_timestep(timestep)
        assert_agrees(mixed[index : index + 1], packed(x[index : index + 1]), 1e-6)


@torch.no_grad()
def test_each_timestep_serves_its_samples_neighbours(simulate: Any) -> None:
    layer = simulate(seeded("linear"))
    packed, x = pack_layer(layer), input_for("linear", 6)
    layer.context.set_timestep(torch.tensor([40, 10]))
    together = packed(x)
    assert_agrees(together, layer(x))
    layer.context.set_timestep(10)
    assert_agrees(together[3:], packed(x[3:]), 1e-6)
    with pytest.raises(StepQuantError, match="batch dimension of 5 with 2 timesteps"):
        layer.context.set_timestep(torch.tensor([40, 10]))
        packed(x[:5])


@layers
@torch.no_grad()
def test_a_table_of_one_row_serves_every_step(kind: str, simulate: Any) -> None:
    layer = simulate(seeded(kind), 4, 8, steps=1)
    packed, x = pack_layer(layer), input_for(kind)
    assert packed.act_scale.shape == (1, 1)
    expected = packed(x)
    assert_agrees(expected, layer(x))
    for timestep in (30, torch.tensor([40, 0, 10])):
        layer.context.set_timestep(timestep)
        assert torch.equal(packed(x), expected)


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12), (2, 1, 4, 12)], ids=str)
@torch.no_grad()
def test_linear_takes_inputs_of_any_rank(shape: tuple[int, ...], simulate: Any) -> None:
    layer = simulate(seeded("linear"), 4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_agrees(pack_layer(layer)(x), layer(x))


@layers
@pytest.mark.parametrize("layout", ["channels-last", "strided"])
@torch.no_grad()
def test_the_memory_layout_of_the_input_changes_nothing(
    kind: str, layout: str, simulate: Any
) -> None:
    layer = simulate(seeded(kind), 4, 8, (7, 5))
    packed, x = pack_layer(layer), input_for(kind)
    if layout == "channels-last" and x.dim() == 4:
        other = x.contiguous(memory_format=torch.channels_last)
    else:
        other = x.repeat_interleave(2, dim=-1)[..., ::2]
        assert not other.is_contiguous()
    assert torch.equal(packed(other), packed(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@layers
@torch.no_grad()
def test_a_half_precision_input_gives_the_float32_result_rounded(
    kind: str, dtype: torch.dtype, simulate: Any
) -> None:
    packed, x = pack_layer(simulate(seeded(kind), 4, 8, (7, 5))), input_for(kind).to(dtype)
    y = packed(x)
    assert y.dtype == dtype
    assert torch.equal(y, packed(x.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_a_cast_model_keeps_its_scales_in_float32(dtype: torch.dtype, simulate: Any) -> None:
    layer = simulate(seeded("conv3x3"), 4, 8, (7, 5))
    layer.multiply_channel_scale(torch.linspace(0.3, 3, 12))
    packed, x = pack_layer(layer), input_for("conv3x3")
    expected = packed(x)
    model = nn.Sequential(packed, nn.GroupNorm(2, 8)).to(dtype)
    assert model[1].weight.dtype == dtype
    dtypes = {value.dtype for value in packed.state_dict().values()}
    assert dtypes == {torch.uint8, torch.float32}
    assert torch.equal(packed(x), expected)


@layers
@torch.no_grad()
def test_a_deep_copy_gives_the_same_and_is_independent(kind: str, simulate: Any) -> None:
    packed, x = pack_layer(simulate(seeded(kind), 4, 8, (7, 5))), input_for(kind)
    expected = packed(x)  # its kernels are prepared now
    twin = copy.deepcopy(packed)
    assert torch.equal(twin(x), expected)
    assert torch.equal(copy.deepcopy(twin)(x), expected)
    twin.context.set_timestep(40)
    for value in twin.state_dict().values():
        value.zero_()
    assert packed.context.rows.tolist() == [0]
    assert torch.equal(packed(x), expected)


@torch.no_grad()
def test_a_deep_copy_of_a_denoiser_follows_its_own_timestep(
    simulate: Any, context: StepContext
) -> None:
    denoiser = Denoiser(pack_layer(simulate(seeded("conv3x3"))))
    context.attach(denoiser)
    twin, x = copy.deepcopy(denoiser), input_for("conv3x3")
    late = denoiser(x, 40)
    early = twin(x, 0)
    assert not torch.equal(late, early)
    assert torch.equal(twin(x, 40), late) and torch.equal(denoiser(x, 0), early)


@layers
@torch.no_grad()
def test_a_loaded_state_dict_gives_the_same_bits(kind: str, simulate: Any) -> None:
    layer = simulate(seeded(kind), 3, 8, (7, 5))
    layer.multiply_channel_scale(torch.linspace(0.3, 3, 12))
    packed, x = pack_layer(layer), input_for(kind)
    optional = ["act_channel_scale"] if layer.bias is None else ["bias", "act_channel_scale"]
    empty = type(packed)(packed.spec, packed.splits, packed.steps, layer.context, optional)
    assert {name: (value.shape, value.dtype) for name, value in empty.state_dict().items()} == {
        name: (value.shape, value.dtype) for name, value in packed.state_dict().items()
    }
    blank = empty(x)  # prepares kernels for a weight that is then replaced
    empty.load_state_dict(packed.state_dict())
    layer.context.set_timestep(torch.tensor([0, 20, 40]))
    assert torch.equal(empty(x), packed(x))
    assert not torch.equal(blank, empty(x))


@pytest.mark.parametrize("bits", range(1, 9))
def test_encode_is_quantize(bits: int) -> None:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(bits)) * 3
    before = x.clone()
    scale, zero_point = torch.tensor([0.0473]), torch.tensor([2**bits // 3], dtype=torch.uint8)
    codes = encode(x, scale, zero_point, bits)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.float(), quantize(x, scale, zero_point, bits))
    assert torch.equal(x, before)
    compiled = torch.compile(encode, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, scale, zero_point, bits), codes)


def test_kernel_names_tell_what_runs(simulate: Any) -> None:
    packed = pack_layer(simulate(seeded("conv3x3"), splits=(7, 5)))
    best = best_kernel()
    assert packed.kernel_names() == [best, best]
    if not NO_ONEDNN:
        assert packed.fallback_reasons() == []
    packed = pack_layer(simulate(seeded("conv3x3"), splits=(7, 5)))
    packed.backend = "reference"
    assert packed.kernel_names() == ["reference", "reference"]
    assert packed.fallback_reasons() == []  # it was asked for


@torch.no_grad()
def test_a_kernel_that_cannot_take_the_layer_says_why_and_the_numbers_stay(simulate: Any) -> None:
    layer = simulate(seeded("conv3x3"), splits=(7, 5))
    packed, x = pack_layer(layer), input_for("conv3x3")
    packed.backend = "int_mm"
    assert packed.fallback_reasons() == ["int_mm: needs CUDA, but the layer is on cpu"] * 2
    assert packed.kernel_names() == ["reference", "reference"]
    assert_agrees(packed(x), layer(x))


@torch.no_grad()
def test_an_unknown_backend_is_refused_until_it_is_put_right(simulate: Any) -> None:
    packed, x = pack_layer(simulate(seeded("linear"))), input_for("linear")
    packed.backend = "fastest"
    for _ in range(2):
        with pytest.raises(StepQuantError, match="unknown backend 'fastest': expected auto or"):
            packed(x)
    packed.backend = "auto"
    assert packed(x).shape == (3, 5, 8)


@pytest.mark.parametrize(("bits", "what"), [((0, 8), "weight"), ((4, 9), "activation")])
def test_bits_are_checked(bits: tuple[int, int], what: str, context: StepContext) -> None:
    with pytest.raises(StepQuantError, match=f"{what} bits is"):
        IntegerLinear(LayerSpec("linear", 12, 8, *bits), (12,), 1, context, ("bias",))


def test_print_and_the_names_of_nn_linear(simulate: Any) -> None:
    packed = pack_layer(simulate(seeded("linear"), 4, 8, (7, 5)))
    assert (packed.in_features, packed.out_features) == (12, 8)
    assert repr(packed) == (
        "IntegerLinear(12, 8, weight_bits=4, activation_bits=8, steps=5, parts=(7, 5))"
    )


@needs_cuda
@layers
@torch.no_grad()
def test_packed_agrees_with_the_simulation_on_cuda(kind: str, simulate: Any) -> None:
    layer = simulate(seeded(kind), 4, 8)
    packed, x = pack_layer(layer).to("cuda"), input_for(kind).to("cuda")
    expected = layer(input_for(kind))
    assert_agrees(packed(x).cpu(), expected)
    assert (
        isinstance(layer, QuantLinear)
        or "int_mm" in packed.kernel_names()
        or (packed.fallback_reasons())
    )


@pytest.mark.parametrize("kind", ["Layer", "Linear", "Conv2d"])
def test_old_names_serve_for_one_release(kind: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"\.Packed{kind} is now .*\.Integer{kind}: "):
        found = getattr(integer, f"Packed{kind}")
    assert found is getattr(integer, f"Integer{kind}")
    with pytest.raises(AttributeError, match="has no attribute 'PackedNothing'"):
        integer.PackedNothing  # noqa: B018
