from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepquant.numerics import fake_quantize
from stepquant.quantizers import ActivationQuantizer
from stepquant.support.errors import StepQuantError

STEPS = 7


def table(steps: int = STEPS, bits: int = 4) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(bits, steps)
    quantizer.scale.data.copy_(torch.linspace(0.02, 0.2, steps))
    quantizer.zero_point.data.copy_(torch.arange(steps) * 2 % 2**bits)
    return quantizer


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shape", [(3, 6), (3, 5, 6), (3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("row", [0, 3, STEPS - 1])
def test_a_row_is_a_quantizer_of_its_own(row: int, shape: tuple[int, ...]) -> None:
    quantizer, x = table(), sample(*shape)
    alone = ActivationQuantizer(4, 1)
    alone.scale.data.copy_(quantizer.scale[row : row + 1])
    alone.zero_point.data.copy_(quantizer.zero_point[row : row + 1])
    y = quantizer(x, torch.tensor([row]))
    assert torch.equal(y, alone(x, torch.tensor([row])))
    assert torch.equal(y, fake_quantize(x, quantizer.scale[row], quantizer.zero_point[row], 4))


def test_rows_differ() -> None:
    quantizer, x = table(), sample(2, 6)
    assert not torch.equal(quantizer(x, torch.tensor([1])), quantizer(x, torch.tensor([2])))


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6), (4, 3, 2, 2)], ids=str)
def test_a_mixed_batch_equals_its_samples_one_by_one(shape: tuple[int, ...]) -> None:
    quantizer, x, rows = table(), sample(*shape), torch.tensor([5, 0, 5, 2])
    one_by_one = [quantizer(x[i : i + 1], rows[i : i + 1]) for i in range(4)]
    assert torch.equal(quantizer(x, rows), torch.cat(one_by_one))


def test_gradients_of_a_mixed_batch_are_the_sums_over_its_samples() -> None:
    quantizer, x, rows = table(), sample(4, 30), torch.tensor([5, 0, 5, 2])
    (quantizer(x, rows) ** 2).sum().backward()
    alone = table()
    for i in range(4):
        (alone(x[i : i + 1], rows[i : i + 1]) ** 2).sum().backward()
    torch.testing.assert_close(quantizer.scale.grad, alone.scale.grad)
    torch.testing.assert_close(quantizer.zero_point.grad, alone.zero_point.grad)


def test_only_rows_of_the_batch_get_a_gradient() -> None:
    quantizer = table()
    quantizer(sample(3, 50), torch.tensor([1, 4, 1])).sum().backward()
    for parameter in (quantizer.scale, quantizer.zero_point):
        assert parameter.grad is not None
        assert parameter.grad.nonzero().flatten().tolist() == [1, 4]
        assert parameter.grad.to_sparse().indices().flatten().tolist() == [1, 4]


def train(
    quantizer: ActivationQuantizer, optimizer: torch.optim.Optimizer, rows: list[int]
) -> None:
    """One step as block distillation takes it: dense gradients turned sparse."""
    optimizer.zero_grad()
    (quantizer(sample(len(rows), 50), torch.tensor(rows)) - 1).square().sum().backward()
    for parameter in (quantizer.scale, quantizer.zero_point):
        assert parameter.grad is not None
        parameter.grad = parameter.grad.to_sparse()
    optimizer.step()


def test_rows_with_momentum_do_not_move_while_they_are_not_in_the_batch() -> None:
    quantizer = table()
    optimizer = torch.optim.SparseAdam(list(quantizer.parameters()), lr=1e-3)
    for _ in range(3):
        train(quantizer, optimizer, list(range(STEPS)))
    before = [parameter.detach().clone() for parameter in quantizer.parameters()]
    for _ in range(3):
        train(quantizer, optimizer, [2, 5, 2])
    others = [0, 1, 3, 4, 6]
    for old, parameter in zip(before, quantizer.parameters(), strict=True):
        assert torch.equal(parameter[others], old[others])
        assert (parameter[[2, 5]] != old[[2, 5]]).all()


def test_each_row_serves_its_samples_neighbours() -> None:
    quantizer, x = table(), sample(6, 5, 4)  # two samples with three heads each
    y = quantizer(x, torch.tensor([1, 6]))
    assert torch.equal(y[:3], quantizer(x[:3], torch.tensor([1])))
    assert torch.equal(y[3:], quantizer(x[3:], torch.tensor([6])))


def test_a_batch_that_is_no_multiple_of_the_timesteps_is_refused() -> None:
    message = "batch dimension of 5 with 2 timesteps: expected a multiple"
    with pytest.raises(StepQuantError, match=message):
        table()(sample(5, 3), torch.tensor([0, 1]))


def test_a_table_of_one_row_serves_every_step() -> None:
    quantizer, x = table(steps=1), sample(3, 6)
    expected = quantizer(x, torch.tensor([0]))
    assert torch.equal(quantizer(x, torch.tensor([6])), expected)
    assert torch.equal(quantizer(x, torch.tensor([6, 1, 3])), expected)


def test_resize_repeats_row_0() -> None:
    quantizer = table()
    quantizer.zero_point.data.fill_(3)
    first = quantizer.scale.tolist()[0]
    quantizer.resize(4)
    assert quantizer.steps == 4
    assert quantizer.scale.tolist() == [first] * 4
    assert quantizer.zero_point.tolist() == [3] * 4
    assert quantizer.scale.requires_grad and quantizer.zero_point.requires_grad


def test_print_shows_bits_and_steps() -> None:
    assert repr(table()) == f"ActivationQuantizer(bits=4, steps={STEPS})"


@pytest.mark.parametrize("bits", [0, 9, True])
def test_bits_are_checked(bits: int) -> None:
    with pytest.raises(StepQuantError, match=f"activation bits is {bits}"):
        ActivationQuantizer(bits, 1)
