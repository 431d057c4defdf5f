from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stepquant.quantizers.low_rank import fitted_adapter, zero_adapter
from stepquant.simulation.packing import pack_layer


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_new_adapter_adds_nothing_and_its_gradient_is_not_zero() -> None:
    adapter = zero_adapter(6, 20, 4, generator())
    assert adapter.down.shape == (4, 20) and adapter.up.shape == (6, 4)
    assert adapter().shape == (6, 20) and not adapter().any()
    adapter().sum().backward()
    assert adapter.up.grad is not None and adapter.up.grad.abs().min() > 0


@pytest.mark.parametrize("fit", [True, False])
def test_the_rank_is_at_most_that_of_the_weight(fit: bool) -> None:
    matrix = torch.randn(3, 20, generator=generator())
    adapter = fitted_adapter(matrix, 32) if fit else zero_adapter(3, 20, 32, generator())
    assert adapter.down.shape == (3, 20) and adapter.up.shape == (3, 3)


def test_a_fitted_adapter_is_the_best_of_its_rank() -> None:
    """Eckart and Young: what is left are the smaller singular values."""
    matrix = torch.randn(12, 20, generator=generator())
    left = matrix - fitted_adapter(matrix, 5)()
    values = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(left.double().norm(), values[5:].norm(), rtol=1e-5, atol=0)
    torch.testing.assert_close(fitted_adapter(matrix, 12)(), matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [lambda: nn.Linear(12, 8), lambda: nn.Conv2d(12, 8, 3)])
@pytest.mark.parametrize("splits", [None, (7, 5)], ids=["one-part", "two-parts"])
def test_a_layer_computes_with_the_sum_until_and_after_it_is_merged(
    build: Any, splits: tuple[int, ...] | None, simulate: Any
) -> None:
    torch.manual_seed(1)
    layer = simulate(build(), 4, 8, splits)
    x = torch.randn(2, 12, 5, 5) if layer.weight.dim() == 4 else torch.randn(2, 12)
    before, weight = layer(x), layer.weight.detach().clone()
    change = 0.2 * torch.randn(weight.flatten(1).shape, generator=generator())
    layer.attach_adapter(fitted_adapter(change, 8))
    attached = layer(x)
    assert torch.equal(layer.weight, weight) and not torch.equal(attached, before)
    packed = pack_layer(layer)
    layer.merge_adapter()
    assert layer.adapter is None
    torch.testing.assert_close(layer.weight, weight + change.view_as(weight), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(x), attached)
    assert torch.equal(pack_layer(layer).weight_packed, packed.weight_packed)
    assert not any("adapter" in name for name in layer.state_dict())
