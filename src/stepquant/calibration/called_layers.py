"""Layers that the sampler's calls of the denoiser never reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stepquant.calibration.trajectories import Trajectories, predict
from stepquant.models.eligibility import LAYERS
from stepquant.models.hooks import hooked

REASON = "never called while the calibration samples"


@torch.no_grad()
def never_called(model: nn.Module, trajectories: Trajectories) -> dict[str, str]:
    """Return the linear and conv layers of `model` that no input of `trajectories` reaches.

    The values are the reason, for the list of the layers that stay float. A model may have layers
    that its pipeline does not use: the separate projections behind fused ones, a projection of a
    condition that is never given. Such a layer has no activations to take ranges of.

    The function runs the inputs of one image, step by step, until every layer has been called.
    """
    waiting = {name: layer for name, layer in model.named_modules() if isinstance(layer, LAYERS)}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        waiting.pop(name, None)

    with hooked(dict(waiting), before=note):
        for row in range(len(trajectories.timesteps)):
            predict(model, trajectories.step(row, 1))
            if not waiting:
                break
    return dict.fromkeys(waiting, REASON)
