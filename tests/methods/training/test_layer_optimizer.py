from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stepquant.calibration.observe import quant_layers
from stepquant.methods.training.layer_optimizer import LayerOptimizer, mean_scale

RATE = 0.25


@pytest.fixture
def block(simulate) -> nn.Sequential:
    """Two layers, the second with a split input, and a norm between them that stays float."""
    torch.manual_seed(0)
    return nn.Sequential(
        simulate(nn.Linear(6, 4), weight_bits=4, activation_bits=4),
        nn.LayerNorm(4),
        simulate(nn.Linear(4, 3), weight_bits=8, activation_bits=8, splits=(1, 3)),
    )


@pytest.fixture
def optimizer(block) -> LayerOptimizer:
    return LayerOptimizer(list(quant_layers(block).values()), RATE, RATE, RATE, iterations=8)


def tables(block):
    return [q for layer in (block[0], block[2]) for q in layer.activation_quantizers]


def loss(block, context, rows):
    x = torch.randn(len(rows), 6, generator=torch.Generator().manual_seed(int(rows.sum())))
    context.set_timestep(rows * 10)
    return block(4 * x).square().sum()


def train(block, optimizer, context, rows, times=1):
    for _ in range(times):
        optimizer.zero_grad()
        loss(block, context, torch.tensor(rows)).backward()
        optimizer.step()


def values(block):
    return [(q.scale.detach().clone(), q.zero_point.detach().clone()) for q in tables(block)]


def test_rows_outside_the_batch_do_not_move_by_their_momentum(block, optimizer, context):
    train(block, optimizer, context, [0, 1, 2, 3, 4], times=3)
    before = values(block)
    train(block, optimizer, context, [1, 3, 3], times=3)
    moved = False
    for old, new in zip(before, values(block), strict=True):
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a[[0, 2, 4]], b[[0, 2, 4]])
            moved = moved or bool((a[[1, 3]] != b[[1, 3]]).any())
    assert moved


def test_the_very_same_steps_under_plain_adam_would_move_them(block, context):
    """The control: without lazy rows the test above fails."""
    optimizer = torch.optim.Adam([q.scale for q in tables(block)], lr=1e-3)
    train(block, optimizer, context, [0, 1, 2, 3, 4], times=3)
    before = values(block)
    train(block, optimizer, context, [1, 3, 3], times=1)
    assert not torch.equal(before[0][0][[0, 2, 4]], values(block)[0][0][[0, 2, 4]])


def test_one_step_moves_every_row_that_is_in_the_batch(block, optimizer, context):
    before = values(block)
    train(block, optimizer, context, [0, 1, 2, 3, 4])
    for (old, _), (new, _) in zip(before, values(block), strict=True):
        assert (old != new).all()


@pytest.fixture
def unit_gradients(block):
    """Sets all gradients to one: Adam then moves each parameter by its rate, downwards."""

    def set_them():
        for parameter in block.parameters():
            parameter.grad = torch.ones_like(parameter)

    return set_them


def test_the_first_step_moves_by_the_rate_in_grid_steps(block, optimizer, unit_gradients):
    for quantizer in tables(block):
        quantizer.zero_point.data.fill_(5.0)
    before = {name: value.detach().clone() for name, value in block.named_parameters()}
    unit_gradients()
    optimizer.step()
    moved = {name: before[name] - value.detach() for name, value in block.named_parameters()}
    for index in ("0", "2"):
        layer = block[int(index)]
        weight_codes = 2**layer.weight_bits - 1
        activation_codes = 2**layer.activation_bits - 1
        step = mean_scale_before(before, index, layer)
        assert_moved(moved[f"{index}.weight"], RATE * step)
        assert_moved(moved[f"{index}.bias"], RATE * step)
        for part in range(len(layer.splits)):
            weights = f"{index}.weight_quantizers.{part}"
            inputs = f"{index}.activation_quantizers.{part}"
            # One end of the range moves by RATE grid steps where the scale moves by RATE / codes.
            own = float(before[f"{weights}.scale"].mean())
            assert_moved(moved[f"{weights}.scale"], RATE * own / weight_codes)
            own = float(before[f"{inputs}.scale"].mean())
            assert_moved(moved[f"{inputs}.scale"], RATE * own / activation_codes)
            assert_moved(moved[f"{inputs}.zero_point"], RATE)
            assert f"{weights}.zero_point" not in moved  # not trained


def mean_scale_before(before, index, layer):
    scales = [
        before[f"{index}.weight_quantizers.{part}.scale"] for part in range(len(layer.splits))
    ]
    return float(torch.cat(scales).mean())


def assert_moved(moved, by):
    torch.testing.assert_close(moved, torch.full_like(moved, by), rtol=1e-3, atol=1e-6)


def test_modules_that_stay_float_are_not_trained(block, optimizer, unit_gradients):
    before = block[1].weight.detach().clone()
    unit_gradients()
    optimizer.step()
    assert torch.equal(block[1].weight, before)


def test_the_rate_falls_to_zero_along_a_cosine(block, unit_gradients):
    optimizer = LayerOptimizer(list(quant_layers(block).values()), RATE, RATE, 1e-3, iterations=8)
    quantizer = block[0].activation_quantizers[0]
    quantizer.zero_point.data.fill_(5.0)
    full = RATE * mean_scale(*block[0].weight_quantizers)
    for iteration in range(8):
        weight, zero = block[0].weight.detach().clone(), quantizer.zero_point.detach().clone()
        unit_gradients()
        optimizer.step()
        share = 0.5 * (1 + math.cos(math.pi * iteration / 8))
        torch.testing.assert_close(
            weight - block[0].weight, torch.full_like(weight, full * share), rtol=1e-3, atol=1e-7
        )
        torch.testing.assert_close(
            zero - quantizer.zero_point, torch.full_like(zero, 1e-3 * share), rtol=0.02, atol=2e-6
        )
    before = [parameter.detach().clone() for parameter in block.parameters()]
    unit_gradients()
    optimizer.step()  # one past the end
    for old, new in zip(before, block.parameters(), strict=True):
        assert torch.equal(old, new)


def test_scales_stay_positive_and_zero_points_on_the_grid(block, unit_gradients):
    optimizer = LayerOptimizer(list(quant_layers(block).values()), 0.0, 1e4, 1e4, iterations=100)
    for sign in (1.0, -1.0):
        for _ in range(3):
            unit_gradients()
            for parameter in block.parameters():
                parameter.grad.mul_(sign)
            optimizer.step()
        for layer in (block[0], block[2]):
            for quantizer in (*layer.weight_quantizers, *layer.activation_quantizers):
                assert (quantizer.scale > 0).all()
                assert torch.isfinite(1 / quantizer.scale).all()
                assert (quantizer.zero_point >= 0).all()
                assert (quantizer.zero_point <= 2**quantizer.bits - 1).all()


def test_rates_of_zero_move_nothing(block, unit_gradients):
    optimizer = LayerOptimizer(list(quant_layers(block).values()), 0.0, 0.0, 0.0, iterations=8)
    before = [parameter.detach().clone() for parameter in block.parameters()]
    unit_gradients()
    optimizer.step()
    for old, new in zip(before, block.parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_layer_can_be_a_block_of_its_own(simulate, context):
    layer = simulate(nn.Conv2d(2, 3, 3, bias=False), weight_bits=4, activation_bits=4)
    optimizer = LayerOptimizer([layer], RATE, RATE, RATE, iterations=4)
    before = layer.weight.detach().clone()
    context.set_timestep(10)
    layer(torch.randn(2, 2, 5, 5)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_parameters_without_a_gradient_stay(block, optimizer, context):
    context.set_timestep(0)
    before = block[2].weight.detach().clone()
    block[0](torch.ones(1, 6)).sum().backward()
    optimizer.step()
    assert torch.equal(block[2].weight, before)


def test_zero_grad_forgets(block, optimizer, context):
    loss(block, context, torch.tensor([0, 1])).backward()
    optimizer.zero_grad()
    trained = [block[0].weight, block[2].bias, *(q.scale for q in tables(block))]
    assert all(parameter.grad is None for parameter in trained)


def test_roundings_are_trained_in_the_place_of_weights_biases_and_weight_scales(block, context):
    layers = list(quant_layers(block).values())
    for layer in layers:
        layer.attach_roundings(layer.weight.detach())
    logits = [rounding.logits.detach().clone() for la in layers for rounding in la.roundings]
    before = {name: value.detach().clone() for name, value in block.named_parameters()}
    train(block, LayerOptimizer(layers, RATE, RATE, RATE, iterations=8), context, [0, 1, 2])
    roundings = [rounding for layer in layers for rounding in layer.roundings]
    for old, rounding in zip(logits, roundings, strict=True):
        moved = (old - rounding.logits.detach()).abs()
        open_ones = rounding.logits.grad.abs() > 1e-4
        assert open_ones.any()
        assert_moved(moved[open_ones], RATE)
    for name, value in block.named_parameters():
        assert torch.equal(value, before[name]) == ("activation_quantizers" not in name), name
