"""Optimizers of quantized layers: rates in grid steps, lazy rows for step tables."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stepquant.numerics import max_code
from stepquant.quantizers import QuantLayer


class Optimizer(Protocol):
    """The interface that a resumable training run needs of its optimizer."""

    def zero_grad(self) -> None:
        """Drop the gradients."""
        ...

    def step(self) -> None:
        """Update all parameters once."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All state that `load_state` needs, by name."""
        ...

    def load_state(self, tensors: dict[str, Tensor], iteration: int) -> None:
        """Restore what `state` returned after `iteration` steps."""
        ...


def mean_scale(*quantizers: Any) -> float:
    """Mean scale (grid step) of one or more quantizers."""
    return float(torch.cat([quantizer.scale.detach() for quantizer in quantizers]).mean())


def cosine_decay(iteration: int, iterations: int) -> float:
    """Factor of a learning rate at `iteration`: from 1 at 0 to 0 at `iterations`."""
    return 0.5 * (1 + math.cos(math.pi * iteration / iterations))


class LayerOptimizer:
    """Adam for weights and weight scales, SparseAdam for step tables, with a common cosine decay.

    SparseAdam keeps its state row by row and touches only rows with a gradient. Plain Adam would
    keep moving the rows of other steps by their momentum.

    A layer with a low-rank adapter trains the adapter in place of weight and bias. A layer with
    learned rounding trains the rounding logits in place of weight, bias and weight scales; its
    scales stay fixed, because its rounded-down codes depend on them.

    Args:
        layers: The layers to train.
        weight_rate: Grid steps that a weight (and a bias) moves per iteration. For rounding logits,
            the learning rate itself.
        scale_rate: Grid steps that the end of a weight range moves per iteration.
        activation_rate: Grid steps that the end of an activation range, and the zero point, moves
            per iteration.
        iterations: Optimizer steps of the cosine decay.

    A grid step is the mean scale of the layer, and ranges count the codes of its nominal bits, even
    where out-channels have more or fewer bits.
    """

    def __init__(
        self,
        layers: list[QuantLayer],
        weight_rate: float,
        scale_rate: float,
        activation_rate: float,
        iterations: int,
    ) -> None:
        dense: list[dict[str, Any]] = []
        sparse: list[dict[str, Any]] = []
        activation: Any
        quantizer: Any
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
            weights: list[Any] = [layer.weight, *([] if layer.bias is None else [layer.bias])]
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
        """Factor of all rates at `iteration`."""
        return cosine_decay(iteration, self._iterations)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters once; scales stay at least 1e-8 and zero points on the grid."""
        for table in self._tables:
            if table.grad is not None:
                table.grad = table.grad.to_sparse()  # holds only rows with a gradient
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
        quantizer: Any
        for layer in self._layers:
            quantizers = [*layer.activation_quantizers]
            if not layer.roundings:
                quantizers = [*layer.weight_quantizers, *quantizers]
            for quantizer in quantizers:
                quantizer.scale.clamp_(min=1e-8)
            for quantizer in layer.activation_quantizers:
                quantizer.zero_point.clamp_(0, max_code(quantizer.bits))

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [
            parameter
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]

    def state(self) -> dict[str, Tensor]:
        """All state that `load_state` needs, by name."""
        tensors = {}
        for number, optimizer in enumerate(self._optimizers):
            for index, values in optimizer.state_dict()["state"].items():
                for key, value in values.items():
                    tensors[f"{number}.{index}.{key}"] = torch.as_tensor(value)
        return tensors

    def load_state(self, tensors: dict[str, Tensor], iteration: int) -> None:
        """Restore what `state` returned after `iteration` steps."""
        for number, optimizer in enumerate(self._optimizers):
            plain = optimizer.state_dict()
            for name, value in tensors.items():
                owner, index, key = name.split(".")
                if int(owner) == number:
                    # SparseAdam keeps its step count as an int, Adam as a tensor.
                    entry = value if key != "step" or number == 0 else int(value)
                    plain["state"].setdefault(int(index), {})[key] = entry
            optimizer.load_state_dict(plain)
            schedule = self._schedules[number]
            schedule.last_epoch = iteration
            for group, base in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
                group["lr"] = base * self._decay(iteration)


class AdamOptimizer:
    """Adam at one rate, which falls along a cosine over `iterations`.

    `beta_2` is 0.99 in place of 0.999: squares are averaged over about a hundred steps, because
    there are not many more.
    """

    def __init__(self, parameters: list[nn.Parameter], rate: float, iterations: int) -> None:
        self._parameters, self._rate, self._iterations = parameters, rate, iterations
        self._adam = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99))
        self._iteration = 0

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update all parameters once."""
        decay = cosine_decay(self._iteration, self._iterations)
        self._adam.param_groups[0]["lr"] = self._rate * decay
        self._adam.step()
        self._iteration += 1

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return self._parameters

    def state(self) -> dict[str, Tensor]:
        """All state that `load_state` needs, by name."""
        return {
            f"{index}.{key}": torch.as_tensor(value)
            for index, values in self._adam.state_dict()["state"].items()
            for key, value in values.items()
        }

    def load_state(self, tensors: dict[str, Tensor], iteration: int) -> None:
        """Restore what `state` returned after `iteration` steps."""
        plain = self._adam.state_dict()
        for name, value in tensors.items():
            index, key = name.split(".")
            plain["state"].setdefault(int(index), {})[key] = value
        self._adam.load_state_dict(plain)
        self._iteration = iteration
