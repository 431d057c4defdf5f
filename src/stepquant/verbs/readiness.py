"""Checks of a denoiser before it is quantized."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from stepquant.quantizers.step_grid import timestep_position
from stepquant.runtime.layers.kinds import kind_of
from stepquant.support.errors import StepQuantError


def check_denoiser(denoiser: nn.Module, what: str) -> None:
    """Check that a denoiser is a float32 one on the CPU whose output does not vary.

    Raises:
        StepQuantError: it is quantized already, of another dtype, on another device, or in training
            mode with layers that then behave differently. The message calls it `what`.
    """
    timestep_position(denoiser)
    if kind_of(denoiser) is not None:
        raise StepQuantError(f"the {what} is quantized already: expected a float model")
    first = next((p for p in denoiser.parameters() if p.is_floating_point()), torch.empty(0))
    if first.dtype != torch.float32:
        raise StepQuantError(
            f"the {what} has the dtype {first.dtype}: expected torch.float32; convert the pipeline "
            "with .to(torch.float32) or name its folder"
        )
    if first.device.type != "cpu":
        raise StepQuantError(
            f"the {what} is on {first.device}: expected "
            "the CPU, where quantization runs; call .to('cpu') first, and move the result"
        )
    # Class embeddings of diffusers drop labels with their own probability.
    training = [module for module in denoiser.modules() if module.training]
    if any(
        (module.p if isinstance(module, _DropoutNd) else drops(module)) > 0 for module in training
    ):
        _refuse_training(what, "dropout")
    if any(isinstance(module, _BatchNorm) for module in training):
        _refuse_training(what, "batch norms, which update their statistics")


def _refuse_training(what: str, has: str) -> NoReturn:
    raise StepQuantError(
        f"the {what} is in training mode and has {has}: "
        "expected a model that gives the same output twice; call .eval() on it first"
    )


def drops(module: nn.Module) -> float:
    """Return the probability with which a class embedding drops its label in training."""
    probability = getattr(module, "dropout_prob", 0.0)
    return probability if isinstance(probability, int | float) else 0.0
