from __future__ import annotations

from itertools import pairwise

import torch

from stepquant.methods.training.guarded_block import CHECKS, is_check, mixed_batches


def test_mixed_batches_come_from_all_steps_of_the_training_inputs():
    timestep = torch.arange(5).repeat(10) * 10
    train = torch.arange(100, 150)
    batches = mixed_batches(train, 6, 30, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == [6] * 30
    assert all(torch.isin(batch, train).all() for batch in batches)
    assert min(timestep[batch - 100].unique().numel() for batch in batches) > 1


def test_the_loss_is_checked_evenly_and_at_the_end():
    for iterations in (1, CHECKS, 100):
        checks = [number for number in range(iterations) if is_check(number, iterations)]
        assert checks[-1] == iterations - 1
        gaps = {later - earlier for earlier, later in pairwise(checks)}
        assert max(gaps, default=1) <= max(1, iterations // CHECKS)
