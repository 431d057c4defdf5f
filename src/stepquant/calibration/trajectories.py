"""The denoiser's own inputs, captured while the user's pipeline samples."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepquant.errors import StepQuantError
from stepquant.progress import Reporter
from stepquant.quantizers.step_grid import StepGrid, timestep_position
from stepquant.sampling import check_count, denoiser_name, denoiser_of, sample_images


@dataclass(frozen=True)
class Trajectories:
    """`N` inputs of the denoiser along sampling trajectories.

    `sample [N, C, H, W]` and `timestep [N]` are what the denoiser was called with, `trajectory
    [N]` (int64) says from which image. `timesteps [T]` are the distinct steps, in sampling order.
    """

    sample: Tensor
    timestep: Tensor
    trajectory: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return self.sample.shape[0]

    def grid(self) -> StepGrid:
        """The step grid of the tables: one row for each step of the sampler."""
        return StepGrid(self.timesteps)

    def at_step(self, row: int, limit: int | None = None) -> Tensor:
        """The (first `limit`) samples at step `timesteps[row]`."""
        return self.sample[self.timestep == self.timesteps[row]][:limit]

    def subset(self, count: int, seed: int) -> Trajectories:
        """`count` inputs (all, if there are fewer), spread evenly over the steps, shuffled."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        # Rank each input within its step, then take the lowest ranks of all steps alike.
        rank = torch.empty(len(self), dtype=torch.int64)
        for step in self.timesteps:
            members = order[self.timestep[order] == step]
            rank[members] = torch.arange(len(members))
        chosen = order[torch.argsort(rank[order], stable=True)][:count]
        chosen = chosen[torch.randperm(len(chosen), generator=generator)]
        return Trajectories(
            self.sample[chosen], self.timestep[chosen], self.trajectory[chosen], self.timesteps
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        return {name: getattr(self, name).contiguous() for name in self.__dataclass_fields__}


def capture_trajectories(
    pipeline: DiffusionPipeline,
    num: int,
    steps: int,
    seed: int,
    scheduler: str | None,
    batch: int = 64,
    reporter: Reporter | None = None,
) -> Trajectories:
    """Sample `num` images with the float pipeline and keep every input of its denoiser.

    Source: DilateQuant, section 5.1: calibration data come from the float model's own sampler.
    Deviation: all steps of each trajectory are kept, instead of one random step for each of many
    more trajectories, which costs `steps` times the sampling.
    """
    check_count(num, "number of calibration trajectories")
    denoiser = denoiser_of(pipeline)
    position = timestep_position(denoiser)
    samples: list[Tensor] = []
    timesteps: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = kwargs["sample"] if "sample" in kwargs else args[0]
        given = kwargs["timestep"] if "timestep" in kwargs else args[position]
        timestep = torch.as_tensor(given)  # a number, [] or [B]
        samples.append(sample.detach().clone())
        timesteps.append(timestep.reshape(-1).expand(sample.shape[0]).clone())

    handle = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    try:
        sample_images(pipeline, num, steps, seed, scheduler, batch, reporter)
    finally:
        handle.remove()
    per_batch = torch.cat(timesteps)
    _, first = _unique_in_order(per_batch)
    # Calls run batch by batch and, inside a batch, step by step.
    sizes = [min(batch, num - start) for start in range(0, num, batch)]
    calls = len(samples) // len(sizes)
    owner = [
        torch.arange(size) + index * batch for index, size in enumerate(sizes) for _ in range(calls)
    ]
    return Trajectories(torch.cat(samples), per_batch, torch.cat(owner), per_batch[first])


class Draw(Protocol):
    """What draws more trajectories with the sampler that was calibrated for."""

    def __call__(self, num: int, seed: int, denoiser: nn.Module | None = None) -> Trajectories:
        """`num` images, image `i` from `seed + i`, by `denoiser` in the float model's place."""
        ...


def drawer(pipeline: DiffusionPipeline, steps: int, scheduler: str | None) -> Draw:
    """Draws with `pipeline`, or with another denoiser in it; see `capture_trajectories`."""

    def draw(num: int, seed: int, denoiser: nn.Module | None = None) -> Trajectories:
        sampler = pipeline
        if denoiser is not None:
            sampler = copy.copy(pipeline)
            sampler.register_modules(**{denoiser_name(pipeline): denoiser})
        return capture_trajectories(sampler, num, steps, seed, scheduler)

    return draw


def _unique_in_order(values: Tensor) -> tuple[list[float], Tensor]:
    seen: dict[float, int] = {}
    for index, value in enumerate(values.tolist()):
        seen.setdefault(value, index)
    if not seen:
        raise StepQuantError("the sampler never called the denoiser: expected at least one step")
    return list(seen), torch.tensor(list(seen.values()))
