from __future__ import annotations

import torch
from torch import nn

from plain_denoiser import SHAPE, Denoiser
from stepquant.calibration.called_layers import REASON, never_called
from stepquant.calibration.trajectories import Trajectories


class Partial(Denoiser):
    """Has a layer for late steps only, and one that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.never = nn.Conv2d(*SHAPE[:1] * 2, 1), nn.Linear(3, 3)
        self.calls = 0

    def forward(self, x, timestep):
        self.calls += 1
        y = super().forward(x, timestep)
        return self.late(y) if float(timestep[0]) < 100 else y


def trajectories(timesteps):
    count = len(timesteps)
    at = torch.tensor(timesteps, dtype=torch.float32)
    return Trajectories(torch.randn(count, *SHAPE), at, torch.zeros(count, dtype=torch.int64), at)


def test_only_layers_that_no_step_calls_are_found():
    model = Partial().eval()
    assert never_called(model, trajectories([900, 500, 50])) == {"never": REASON}
    assert never_called(model, trajectories([900, 500])) == {"late": REASON, "never": REASON}


def test_one_call_is_enough_where_every_layer_runs():
    model = Partial().eval()
    del model.never
    assert never_called(model, trajectories([50, 900, 500])) == {}
    assert model.calls == 1
