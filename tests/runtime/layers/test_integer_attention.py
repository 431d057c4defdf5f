"""Packed attention products against the simulation that they come from."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from stepquant.quantizers import QuantAttention, StepContext
from stepquant.runtime.layers.integer_attention import PackedAttention
from stepquant.simulation.packing import pack_attention
from stepquant.support.errors import StepQuantError

B, H, N, M, D, STEPS = 4, 2, 5, 7, 8, 5


def operands(length: int = M) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = (N, length, length)
    q, k, v = (2 * torch.randn(B, H, size, D, generator=generator) for size in sizes)
    return q, k, v


MASK = torch.zeros(B, 1, 1, M)
MASK[::2, ..., -2:] = -torch.inf


def simulated(
    context: StepContext, bits: int = 8, probability_bits: int = 8, steps: int = STEPS
) -> QuantAttention:
    """Random tables; the first, third and last step have the log2 grid."""
    built = QuantAttention(bits, probability_bits, context)
    built.resize(steps)
    generator = torch.Generator().manual_seed(bits)
    for quantizer in built.activation_quantizers:
        spread = 0.5 + torch.rand(steps, generator=generator)
        quantizer.scale.data.copy_(8 * spread / 2**bits)
        quantizer.zero_point.data.copy_(2**bits * (0.3 + 0.4 * spread.flip(0) / 1.5))
    built.probabilities.log2[::2] = True
    spread = 0.5 + torch.rand(steps, generator=generator)
    built.probabilities.scale.data.copy_(
        torch.where(built.probabilities.log2, spread, spread / 2**probability_bits)
    )
    built.quantizing = True
    return built


TIMES = {"log2": 0, "uniform": 10, "mixed": [40, 10, 0, 10], "between": [33, 33, 4, 16]}


@torch.no_grad()
@pytest.mark.parametrize("timestep", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("bits", [(8, 8), (8, 3), (4, 6), (1, 1)], ids=str)
@pytest.mark.parametrize("steps", [STEPS, 1], ids=["steps", "static"])
def test_packed_is_the_simulation_bit_by_bit(context, timestep, bits, steps):
    attention = simulated(context, *bits, steps)
    packed = pack_attention(attention)
    context.set_timestep(torch.tensor(timestep))
    for mask in (None, MASK):
        assert torch.equal(packed(*operands(), mask), attention(*operands(), mask))


@torch.no_grad()
def test_sums_beyond_float32_are_the_same_too(context):
    """With 300 keys sums of products of 8 bits do not fit."""
    attention = simulated(context)
    packed = pack_attention(attention)
    for timestep in (0, 10, [40, 10, 0, 30]):
        context.set_timestep(torch.tensor(timestep))
        assert torch.equal(packed(*operands(300)), attention(*operands(300)))


@torch.no_grad()
def test_steps_differ_and_a_mixed_batch_is_its_samples(context):
    packed, times = pack_attention(simulated(context)), [40, 10, 0, 10]
    context.set_timestep(torch.tensor(times))
    together = packed(*operands())
    for sample, timestep in enumerate(times):
        context.set_timestep(timestep)
        alone = packed(*operands())
        torch.testing.assert_close(together[sample], alone[sample], rtol=1e-6, atol=1e-6)
        assert sample == 2 or not torch.allclose(alone[2], together[2], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_low_precision_model_keeps_its_tables(context, dtype):
    packed = pack_attention(simulated(context))
    low = pack_attention(simulated(context)).to(dtype)
    for name, tensor in packed.state_dict().items():
        assert low.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(low.state_dict()[name], tensor), name
    context.set_timestep(torch.tensor([40, 10, 0, 10]))
    inputs = [tensor.to(dtype) for tensor in operands()]
    y = low(*inputs, MASK.to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, packed(*(tensor.float() for tensor in inputs), MASK).to(dtype))


@torch.no_grad()
def test_copies_are_their_own(context):
    packed = pack_attention(simulated(context))
    context.set_timestep(20)
    before = packed(*operands())
    other = copy.deepcopy(packed).to("cpu")
    assert torch.equal(other(*operands()), before)
    assert other.context is not packed.context
    other.context.set_timestep(10)
    assert torch.equal(packed(*operands()), before)
    assert not torch.equal(other(*operands()), before)


@torch.no_grad()
def test_loaded_tables_count_even_after_a_call(context):
    """That some step has a log2 grid is looked up once, but not for good."""
    uniform = simulated(context)
    uniform.probabilities.log2.fill_(False)
    packed, mixed = pack_attention(uniform), pack_attention(simulated(context))
    context.set_timestep(0)
    packed(*operands())
    packed.load_state_dict(mixed.state_dict())
    assert torch.equal(packed(*operands()), mixed(*operands()))


@torch.no_grad()
def test_autocast_changes_nothing(context):
    packed = pack_attention(simulated(context))
    context.set_timestep(10)
    expected = packed(*operands())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(*operands()), expected)


@torch.no_grad()
def test_it_compiles_to_one_graph_for_all_steps(context):
    torch._dynamo.reset()
    packed = pack_attention(simulated(context))
    packed(*operands())
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(packed, backend=counter, fullgraph=True)
    for timestep in (0, 10, 40):
        context.set_timestep(timestep)
        assert torch.equal(compiled(*operands()), packed(*operands()))
    assert counter.frame_count == 1


def test_a_zero_point_off_the_grid_is_refused(context):
    attention = simulated(context, 4)
    attention.activation_quantizers[1].zero_point.data[2] = 16
    with pytest.raises(StepQuantError, match=r"activation .* for 4 bits"):
        pack_attention(attention)


@pytest.mark.parametrize("bits", [(0, 8), (8, 9)], ids=str)
def test_bits_out_of_range_are_refused(context, bits):
    with pytest.raises(StepQuantError, match="expected a whole number of bits from 1 to 8"):
        PackedAttention(*bits, 1, context)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_numbers_of_the_cpu(context):
    packed = pack_attention(simulated(context))
    context.set_timestep(torch.tensor([40, 10, 0, 10]))
    expected = packed(*operands(), MASK)
    found = packed.to("cuda")(*(x.cuda() for x in operands()), MASK.cuda()).cpu()
    # Another exp may move one probability to the next level.
    assert ((found - expected).abs() > 1e-5).float().mean() < 0.02
