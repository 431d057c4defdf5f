"""The optimizer of one quantized block: rates in grid steps, lazy rows for the step tables."""

from __future__ import annotations

import math

import torch
from torch import nn

from stepquant.calibration.observe import quant_layers
from stepquant.numerics import max_code
from stepquant.quantizers import QuantLayer


def mean_scale(*quantizers: nn.Module) -> float:
    """Mean grid step of one or more quantizers."""
    return float(torch.cat([quantizer.scale.detach() for quantizer in quantizers]).mean())


class BlockOptimizer:
    """Adam for weights and weight scales, SparseAdam for step tables, one cosine decay for both.

    SparseAdam keeps its state row by row and touches only the rows that a batch named: plain Adam
    would go on moving the rows of other steps by their momentum.
    """

    def __init__(
        self,
        block: nn.Module,
        weight_rate: float,
        scale_rate: float,
        activation_rate: float,
        iterations: int,
    ) -> None:
        dense, sparse = [], []
        layers = list(quant_layers(block).values())
        if isinstance(block, QuantLayer):
            layers = [block]
        for layer in layers:
            step = mean_scale(*layer.weight_quantizers)
            weights = [layer.weight] + ([] if layer.bias is None else [layer.bias])
            dense.append({"params": weights, "lr": weight_rate * step})
            for quantizer in layer.weight_quantizers:
                rate = scale_rate * mean_scale(quantizer) / max_code(quantizer.bits)
                dense.append({"params": [quantizer.scale], "lr": rate})
            for activation in layer.activation_quantizers:
                rate = activation_rate * mean_scale(activation)
                rate /= max_code(activation.bits)
                sparse.append({"params": [activation.scale], "lr": rate})
                sparse.append({"params": [activation.zero_point], "lr": activation_rate})
        self._layers = layers
        self._tables = [parameter for group in sparse for parameter in group["params"]]
        self._optimizers = [torch.optim.Adam(dense), torch.optim.SparseAdam(sparse)]

        def decay(iteration: int) -> float:
            return 0.5 * (1 + math.cos(math.pi * iteration / iterations))

        self._schedules = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, decay) for optimizer in self._optimizers
        ]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self) -> None:
        """One update, then scales stay positive and zero points on the grid."""
        for table in self._tables:
            if table.grad is not None:
                table.grad = table.grad.to_sparse()  # names the rows with a gradient
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
        for layer in self._layers:
            for quantizer in (*layer.weight_quantizers, *layer.activation_quantizers):
                quantizer.scale.clamp_(min=1e-8)
                quantizer.zero_point.clamp_(0, max_code(quantizer.bits))
