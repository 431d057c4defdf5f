from __future__ import annotations

import numpy as np
import pytest
import torch

from stepquant.methods import LowRankAdapters

STARTS = ["zero", "quantization_error"]


def ready(tiny_session, **options):
    session = tiny_session(**{"weights": 2, "activations": 8, **options})
    session.ensure_ranges()
    return session


def weights(session):
    return {name: layer.weight.detach().clone() for name, layer in session.layers().items()}


def singular_values(matrix):
    return np.linalg.svd(matrix.flatten(1).double().numpy(), compute_uv=False)


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 5])
def test_with_the_error_the_sum_is_the_weight_up_to_what_the_rank_cannot_hold(rank, tiny_session):
    """Eckart and Young: what is missing has the smaller singular values of the rounding's error."""
    session = ready(tiny_session)
    before = weights(session)
    rounded = {name: layer.quantized_weight().clone() for name, layer in session.layers().items()}
    LowRankAdapters(rank=rank, start="quantization_error").apply(session)
    for name, layer in session.layers().items():
        assert torch.equal(layer.weight, rounded[name]), name
        missing = singular_values(before[name] - layer.merged_weight())
        values = singular_values(before[name] - rounded[name])
        expected = np.zeros_like(values)
        expected[: len(values) - rank] = values[rank:]
        np.testing.assert_allclose(missing, expected, atol=2e-6 * max(1.0, values[0]), err_msg=name)
        assert layer.adapter.up.any() and layer.adapter.down.any(), name


@torch.no_grad()
def test_at_full_rank_the_sum_is_the_weight(tiny_session):
    session = ready(tiny_session)
    before = weights(session)
    LowRankAdapters(rank=1000, start="quantization_error").apply(session)
    for name, layer in session.layers().items():
        torch.testing.assert_close(layer.merged_weight(), before[name], rtol=1e-5, atol=2e-6)
        assert len(layer.adapter.down) == min(before[name].flatten(1).shape), name


@torch.no_grad()
@pytest.mark.parametrize("rank", [2, 8])
def test_the_start_with_the_error_rounds_about_as_well_as_that_at_zero(rank, tiny_session):
    """Added to the weight itself, the adapter would make the error up to 2.5 times as large."""
    session = ready(tiny_session, ranges="mse")
    before = weights(session)

    def errors():
        return {
            name: float((layer.quantized_weight() - before[name]).square().sum())
            for name, layer in session.layers().items()
        }

    zero = errors()
    LowRankAdapters(rank=rank, start="quantization_error").apply(session)
    for name, error in errors().items():
        assert error <= 1.08 * zero[name], name


@torch.no_grad()
def test_the_start_at_zero_changes_nothing(tiny_session):
    session = ready(tiny_session)
    before = weights(session)
    LowRankAdapters(rank=4).apply(session)
    for name, layer in session.layers().items():
        assert torch.equal(layer.weight, before[name])
        assert torch.equal(layer.merged_weight(), before[name])


def test_with_the_error_both_factors_have_a_gradient_at_once(tiny_session):
    session = ready(tiny_session)
    LowRankAdapters(rank=2, start="quantization_error").apply(session)
    data = session.trajectories
    session.model(data.sample, data.timestep).sample.square().sum().backward()
    for name, layer in session.layers().items():
        for factor in (layer.adapter.up, layer.adapter.down):
            assert factor.grad.abs().max() > 0, name


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("rank", [3, 1000])
def test_the_summary_counts_what_is_trained(rank, start, tiny_session):
    session = ready(tiny_session)
    LowRankAdapters(rank=rank, start=start).apply(session)
    expected = 0
    for layer in session.layers().values():
        rows, columns = layer.weight.flatten(1).shape
        expected += min(rank, rows, columns) * (rows + columns)
    summary = session.summary["low_rank_adapters"]
    assert summary == {"rank": rank, "trained_parameters": expected}
