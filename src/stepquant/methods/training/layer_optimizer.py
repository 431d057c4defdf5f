"""The optimizer of quantized layers: rates in grid steps, lazy rows for the step tables."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from stepquant.numerics import max_code
from stepquant.quantizers import QuantLayer


class Optimizer(Protocol):
    """What a training that goes on where it was stopped needs of its optimizer."""

    def zero_grad(self) -> None:
        """Forget the gradients."""
        ...

    def step(self) -> None:
        """One update."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that `load_state` needs to go on from here, by name."""
        ...

    def load_state(self, tensors: dict[str, Tensor], iteration: int) -> None:
        """Take up what `state` gave after `iteration` steps."""
        ...


def mean_scale(*quantizers: nn.Module) -> float:
    """Mean grid step of one or more quantizers."""
    return float(torch.cat([quantizer.scale.detach() for quantizer in quantizers]).mean())


def cosine_decay(iteration: int, iterations: int) -> float:
    """The share of a learning rate at `iteration`: from 1 at 0 to 0 at `iterations`."""
    return 0.5 * (1 + math.cos(math.pi * iteration / iterations))


class LayerOptimizer:
    """Adam for weights and weight scales, SparseAdam for step tables, one cosine decay for both.

    Where a layer has a low-rank adapter, that is trained in the place of its weight and bias; where
    it has roundings, their logits are, in the place of weight, bias and weight scales (the floors
    hang on the scales), and `weight_rate` is theirs as it is. Rates are in grid steps of the layer:
    mean scales and the codes of its nominal bits, also where out-channels have more or fewer bits.

    SparseAdam keeps its state row by row and touches only the rows that a batch named: plain Adam
    would go on moving the rows of other steps by their momentum.
    """

    def __init__(
        self,
        layers: list[QuantLayer],
        weight_rate: float,
        scale_rate: float,
        activation_rate: float,
        iterations: int,
    ) -> None:
        dense, sparse = [], []
        for layer in layers:
            for activation in layer.activation_quantizers:
                rate = activation_rate * mean_scale(activation)
                rate /= max_code(activation.bits)
                sparse.append({"params": [activation.scale], "lr": rate})
                sparse.append({"params": [activation.zero_point], "lr": activation_rate})
            if layer.roundings:
                logits = [rounding.logits for rounding in layer.roundings]
                dense.append({"params": logits, "lr": weight_rate})
                continue
            step = mean_scale(*layer.weight_quantizers)
            weights = [layer.weight] + ([] if layer.bias is None else [layer.bias])
            if layer.adapter is not None:
                weights = list(layer.adapter.parameters())
            dense.append({"params": weights, "lr": weight_rate * step})
            for quantizer in layer.weight_quantizers:
                rate = scale_rate * mean_scale(quantizer) / max_code(quantizer.bits)
                dense.append({"params": [quantizer.scale], "lr": rate})
        self._layers = layers
        self._tables = [parameter for group in sparse for parameter in group["params"]]
        self._optimizers = [torch.optim.Adam(dense), torch.optim.SparseAdam(sparse)]
        self._iterations = iterations
        self._schedules = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, self._decay)
            for optimizer in self._optimizers
        ]

    def _decay(self, iteration: int) -> float:
        return cosine_decay(iteration, self._iterations)

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
            weights = () if layer.roundings else layer.weight_quantizers
            for quantizer in (*weights, *layer.activation_quantizers):
                quantizer.scale.clamp_(min=1e-8)
            for quantizer in layer.activation_quantizers:
                quantizer.zero_point.clamp_(0, max_code(quantizer.bits))

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        return [
            parameter
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]

    def state(self) -> dict[str, Tensor]:
        """Everything that `load_state` needs to go on from here, by name."""
        tensors = {}
        for number, optimizer in enumerate(self._optimizers):
            for index, values in optimizer.state_dict()["state"].items():
                for key, value in values.items():
                    tensors[f"{number}.{index}.{key}"] = torch.as_tensor(value)
        return tensors

    def load_state(self, tensors: dict[str, Tensor], iteration: int) -> None:
        """Take up what `state` gave after `iteration` steps."""
        for number, optimizer in enumerate(self._optimizers):
            plain = optimizer.state_dict()
            for name, value in tensors.items():
                owner, index, key = name.split(".")
                if int(owner) == number:
                    # SparseAdam counts its steps in a plain number.
                    entry = value if key != "step" or number == 0 else int(value)
                    plain["state"].setdefault(int(index), {})[key] = entry
            optimizer.load_state_dict(plain)
            schedule = self._schedules[number]
            schedule.last_epoch = iteration
            for group, base in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
                group["lr"] = base * self._decay(iteration)


class AdamOptimizer:
    """Adam at one rate, which falls along a cosine over `iterations`.

    The squares are averaged over a hundred steps, not a thousand: there are not many more.
    """

    def __init__(self, parameters: list[nn.Parameter], rate: float, iterations: int) -> None:
        self._parameters, self._rate, self._iterations = parameters, rate, iterations
        self._adam = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99))
        self._iteration = 0

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One update."""
        decay = cosine_decay(self._iteration, self._iterations)
        self._adam.param_groups[0]["lr"] = self._rate * decay
        self._adam.step()
        self._iteration += 1

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        return self._parameters

    def state(self) -> dict[str, Tensor]:
        """Everything that `load_state` needs to go on from here, by name."""
        return {
            f"{index}.{key}": torch.as_tensor(value)
            for index, values in self._adam.state_dict()["state"].items()
            for key, value in values.items()
        }

    def load_state(self, tensors: dict[str, Tensor], iteration: int) -> None:
        """Take up what `state` gave after `iteration` steps."""
        plain = self._adam.state_dict()
        for name, value in tensors.items():
            index, key = name.split(".")
            plain["state"].setdefault(int(index), {})[key] = value
        self._adam.load_state_dict(plain)
        self._iteration = iteration
