from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from stepquant.calibration.sensitivity import output_errors
from stepquant.calibration.trajectories import Trajectories
from stepquant.quantizers import QuantConv2d, QuantLinear, StepContext, StepGrid
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter

QUIET = Reporter(quiet=True)


class Net(nn.Module):
    """A denoiser of two linear maps, so that first order is everything: conv, then all to `out`."""

    def __init__(self, out: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        context = StepContext(StepGrid(torch.tensor([1.0, 0.0])))
        self.conv = QuantConv2d(nn.Conv2d(2, 3, 3, padding=1), 4, 4, context)
        self.head = QuantLinear(nn.Linear(3 * 16, out), 4, 4, context)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.head(self.conv(sample).flatten(1)),)

    def layers(self) -> dict[str, QuantConv2d | QuantLinear]:
        return {"conv": self.conv, "head": self.head}


def inputs(count: int, trajectory: list[int] | None = None) -> Trajectories:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(count, 2, 4, 4, generator=generator)
    steps = torch.arange(count) % 2
    owners = torch.arange(count) if trajectory is None else torch.tensor(trajectory)
    return Trajectories(sample, 1.0 - steps, owners, torch.tensor([1.0, 0.0]))


def candidates(layer: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = layer.weight.shape
    return [size * torch.randn(shape, generator=generator) for size in (0.1, 0.01)]


def added_to_input(samples: Tensor, x: Tensor) -> list[Tensor]:
    noise = []
    for index in samples.tolist():
        generator = torch.Generator().manual_seed(100 + index)
        noise.append(torch.randn(x.shape[1:], generator=generator))
    return [size * torch.stack(noise) for size in (0.3, 0.03)]


def with_error(index: int, number: int, x: Tensor) -> Tensor:
    return x + added_to_input(torch.tensor([index]), x.float())[number].double()


@torch.no_grad()
def by_brute_force(net: Net, data: Trajectories) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same means, each candidate really added and the whole model run again, in float64."""
    net.double()
    count = 1 + int(data.trajectory.max())
    layers = net.layers().items()
    weights = {name: torch.zeros(count, 2, layer.out_channels) for name, layer in layers}
    of_inputs = {name: torch.zeros(count, 2) for name in net.layers()}
    v = gradients(net, len(data)).double()
    for index, owner in enumerate(data.trajectory.tolist()):
        x, t = data.sample[index : index + 1].double(), data.timestep[index : index + 1]
        y = net(x, t, return_dict=False)[0]
        for name, layer in net.layers().items():
            for number, error in enumerate(candidates(layer)):
                for channel in range(layer.out_channels):
                    layer.weight[channel] += error[channel]
                    moved = net(x, t, return_dict=False)[0] - y
                    layer.weight[channel] -= error[channel]
                    weights[name][owner, number, channel] += (v[index] * moved).sum().float()
            for number in range(2):
                add = partial(with_error, index, number)
                handle = layer.register_forward_pre_hook(lambda _, args, add=add: add(args[0]))
                moved = net(x, t, return_dict=False)[0] - y
                handle.remove()
                of_inputs[name][owner, number] += (v[index] * moved).sum().float()
    net.float()
    return (
        {name: table.square().mean(dim=0) for name, table in weights.items()},
        {name: table.square().mean(dim=0) for name, table in of_inputs.items()},
    )


def gradients(net: Net, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, net.head.out_channels, generator=generator)


def measured(net: Net, data: Trajectories):
    return output_errors(
        net,
        net.layers(),
        data,
        gradients(net, len(data)),
        {name: candidates(layer) for name, layer in net.layers().items()},
        {name: added_to_input for name in net.layers()},
        QUIET,
    )


@pytest.mark.parametrize("outputs", [1, 6])
@pytest.mark.parametrize("trajectory", [None, [0, 1, 0, 1, 1], [0] * 5, [0] * 25])
def test_brute_force_agrees(outputs, trajectory):
    net, data = Net(outputs), inputs(len(trajectory or range(5)), trajectory)
    weights, of_inputs = by_brute_force(net, data)
    found = measured(net, data)
    for name in net.layers():
        torch.testing.assert_close(found.weights[name].float(), weights[name], rtol=1e-3, atol=0)
        torch.testing.assert_close(found.inputs[name].float(), of_inputs[name], rtol=1e-3, atol=0)
    assert found.sizes == {"conv": 32, "head": 48}


def test_only_what_was_asked_for_is_measured_and_nothing_is_left_behind():
    net, data = Net(2), inputs(2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    errors = {"head": candidates(net.head)}
    found = output_errors(net, net.layers(), data, gradients(net, 2), errors, {}, QUIET)
    assert list(found.weights) == ["head"]
    assert not found.inputs
    assert not found.sizes
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not net.conv._forward_pre_hooks
    assert not net.head._forward_pre_hooks
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_model_that_predicts_nothing_is_refused():
    net, data = Net(1), inputs(1)
    net.head.weight.data.fill_(float("nan"))
    with pytest.raises(StepQuantError, match="prediction at timestep 1 holds NaN or infinity"):
        measured(net, data)
