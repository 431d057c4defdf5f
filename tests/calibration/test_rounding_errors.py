from __future__ import annotations

import pytest
import torch
from torch import nn

from stepquant.calibration.rounding_errors import input_errors, input_grids, weight_error
from stepquant.calibration.trajectories import Trajectories
from stepquant.quantizers import QuantConv2d, StepContext, StepGrid
from stepquant.quantizers.weight import minmax_weight_range


class Denoiser(nn.Module):
    """One conv with an input of two parts, and in-channels that are divided."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        context = StepContext(StepGrid(torch.tensor([1.0])))
        self.conv = QuantConv2d(nn.Conv2d(4, 3, 3, padding=1), 4, 4, context, (1, 3))
        self.conv.multiply_channel_scale(torch.tensor([1.0, 2.0, 4.0, 0.5]))

    def forward(self, sample, timestep):
        return self.conv(sample)


def inputs(count: int) -> Trajectories:
    sample = torch.randn(count, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    return Trajectories(sample, torch.ones(count), torch.arange(count), torch.tensor([1.0]))


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_a_weight_with_its_error_lies_on_its_grid(bits):
    layer = Denoiser().conv
    moved = layer.weight + weight_error(layer, bits, minmax_weight_range)
    for before, after in zip(layer.weight_parts(), moved.split(layer.splits, dim=1), strict=True):
        scale, _ = minmax_weight_range(before.flatten(1), bits)
        steps = (after - after.flatten(1)[:, :1, None, None]) / scale[:, None, None, None]
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert all(len(row.round().unique()) <= 2**bits for row in steps)
        assert ((after - before).abs() <= scale[:, None, None, None] * 0.501).all()


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_an_input_with_its_error_lies_on_a_grid_behind_the_scaling(method):
    model, data = Denoiser(), inputs(3)
    layer = model.conv
    grids = input_grids(model, {"conv": layer}, data, range(2, 5), method)["conv"]
    assert list(grids) == [2, 3, 4]
    last = torch.inf
    for number, (bits, grid) in enumerate(grids.items()):
        x = data.sample[1:2]
        error = input_errors(layer, grids, torch.tensor([1]), x)[number]
        assert error.shape == x.shape
        for part, (scale, zero) in zip(layer.input_parts(x + error), grid, strict=True):
            assert scale.shape == zero.shape == (3,)
            codes = part / scale[1] + zero[1]
            torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
            assert codes.min() > -1e-3
            assert codes.max() < 2**bits - 1 + 1e-3
        assert float(error.square().sum()) < last
        last = float(error.square().sum())


def test_the_search_leaves_less_error_than_the_extremes_do():
    model, data = Denoiser(), inputs(3)
    data.sample[:, :, 0, 0] *= 6  # outliers, which extremes cover
    total = {}
    for method in ("minmax", "mse"):
        grids = input_grids(model, {"conv": model.conv}, data, range(3, 4), method)["conv"]
        found = input_errors(model.conv, grids, torch.arange(3), data.sample)[0]
        total[method] = float(found.square().sum())
    assert total["mse"] < total["minmax"]


def test_samples_at_once_are_samples_one_by_one():
    model, data = Denoiser(), inputs(3)
    grids = input_grids(model, {"conv": model.conv}, data, range(3, 4), "mse")["conv"]
    order = torch.tensor([2, 0])
    together = input_errors(model.conv, grids, order, data.sample[order])[0]
    alone = [input_errors(model.conv, grids, i[None], data.sample[i[None]])[0] for i in order]
    assert torch.equal(together, torch.cat(alone))
