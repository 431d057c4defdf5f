"""Trajectories: the denoiser's inputs, captured while the user's pipeline samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepquant.calibration.conditions import Conditions
from stepquant.calibration.input_capture import InputCapture, Seen
from stepquant.models.calling import call_denoiser
from stepquant.models.hooks import hooked
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.resolved import ResolvedPipeline, denoiser_of
from stepquant.pipelines.sampling import check_count, sample_images
from stepquant.quantizers.step_grid import StepGrid
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter

TENSORS = ("sample", "timestep", "trajectory", "timesteps")


@dataclass(frozen=True)
class Trajectories:
    """`N` inputs of the denoiser along sampling trajectories.

    - `sample`: `[N, C, H, W]` or `[N, tokens, C]`.
    - `timestep`: `[N]`.
    - `trajectory`: the image that each input belongs to, `[N]` (int64).
    - `timesteps`: the distinct timesteps in sampling order, `[T]`.
    - `conditions`: the other arguments of the denoiser.

    With classifier-free guidance an image has two inputs at each step.
    """

    sample: Tensor
    timestep: Tensor
    trajectory: Tensor
    timesteps: Tensor
    conditions: Conditions = field(default_factory=Conditions)

    def __len__(self) -> int:
        return self.sample.shape[0]

    @property
    def guided(self) -> bool:
        """Whether the sampler uses more than one prediction of an image at a step."""
        at_first = self.trajectory[self.rows(0)]
        return len(at_first) > len(at_first.unique())

    def grid(self) -> StepGrid:
        """Return the step grid of the step tables, with one row for each step of the sampler."""
        return StepGrid(self.timesteps)

    def rows(self, row: int, images: int | None = None) -> Tensor:
        """Return the indices of the inputs at step `timesteps[row]`, of the first `images` images.

        None for `images` means all. With guidance, all inputs of an image are included: the first
        few inputs alone could cover fewer images, or only one kind of prediction.
        """
        found = (self.timestep == self.timesteps[row]).nonzero().flatten()
        owners = self.trajectory[found]
        first = list(dict.fromkeys(owners.tolist()))[:images]
        return found[torch.isin(owners, torch.tensor(first, dtype=owners.dtype))]

    def step(self, row: int, images: int | None = None) -> Trajectories:
        """Return the inputs at step `timesteps[row]`, of the first `images` images (None: all)."""
        return self.take(self.rows(row, images))

    def take(self, index: Tensor | slice) -> Trajectories:
        """Return the inputs at `index`."""
        return Trajectories(
            self.sample[index],
            self.timestep[index],
            self.trajectory[index],
            self.timesteps,
            self.conditions.take(index),
        )

    def batches(self, size: int) -> Iterator[Trajectories]:
        """Yield all inputs, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def subset(self, count: int, seed: int) -> Trajectories:
        """Return `count` inputs, spread evenly over the steps and shuffled by `seed`.

        If there are fewer than `count`, all are returned.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        # Rank each input within its step, then take the lowest ranks over all steps.
        rank = torch.empty(len(self), dtype=torch.int64)
        for step in self.timesteps:
            members = order[self.timestep[order] == step]
            rank[members] = torch.arange(len(members))
        chosen = order[torch.argsort(rank[order], stable=True)][:count]
        return self.take(chosen[torch.randperm(len(chosen), generator=generator)])

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store in a safetensors file."""
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}
        return {**tensors, **self.conditions.to_tensors()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Trajectories:
        """Rebuild the trajectories from the tensors of `to_tensors`."""
        conditions = Conditions.from_tensors(tensors)
        stored = {name: tensors[name] for name in TENSORS}
        return cls(**stored, conditions=conditions)


def predict(denoiser: nn.Module, inputs: Trajectories) -> Tensor:
    """Return the denoiser's prediction for `inputs`, `[N, ...]`, from one call."""
    arguments = inputs.conditions.arguments()
    return call_denoiser(denoiser, inputs.sample, inputs.timestep, arguments)


def first_inputs(
    pipeline: DiffusionPipeline,
    steps: int,
    seed: int,
    scheduler: str | None,
    conditioning: Conditioning | None = None,
) -> Trajectories:
    """Return the inputs of the sampler's first denoiser call for one image.

    Sampling stops before the denoiser runs. There is one input, or two if guidance passes both
    inputs of an image in one batch. The arguments are those of `capture_trajectories`.

    Raises:
        StepQuantError: the pipeline cannot be sampled like this, or never calls the denoiser.
    """
    denoiser = denoiser_of(pipeline)
    capture = InputCapture(denoiser)

    def look(*call: Any) -> None:
        capture(*call)
        raise Seen

    with suppress(Seen), hooked({"": denoiser}, before=look):
        sample_images(pipeline, 1, steps, seed, scheduler, conditioning=conditioning, decode=False)
    _check_called(capture)
    timestep = torch.cat(capture.timesteps)
    owner = torch.zeros(len(timestep), dtype=torch.int64)
    sample, conditions = torch.cat(capture.samples), capture.conditions.conditions()
    return Trajectories(sample, timestep, owner, timestep.unique(), conditions)


def capture_trajectories(
    pipeline: DiffusionPipeline,
    num: int,
    steps: int,
    seed: int,
    scheduler: str | None,
    batch: int = 64,
    reporter: Reporter | None = None,
    conditioning: Conditioning | None = None,
    first: int = 0,
) -> Trajectories:
    """Sample `num` images with the float pipeline and keep every input of its denoiser.

    Image `i` starts from the noise of seed `seed + first + i` and has condition number `first + i`
    of `conditioning`. The inputs are ordered by batch, step and image.

    Source: DilateQuant, section 5.1: calibration data come from the float model's own sampler.
    Deviation: all steps of each trajectory are kept. One random step for each of many more
    trajectories would cost `steps` times the sampling.

    Args:
        pipeline: float pipeline.
        num: number of images.
        steps: number of sampling steps.
        seed: seed of the noise.
        scheduler: name of the scheduler, as in `sample_images`; None for the pipeline's own.
        batch: largest number of images sampled at once.
        reporter: shows progress; None shows none.
        conditioning: prompts or labels, and guidance.
        first: number of the first image.

    Raises:
        StepQuantError: `num` is below 1, the pipeline cannot be sampled like this, the sampler
            never calls the denoiser, or its calls cannot be assigned to images.
    """
    check_count(num, "number of calibration trajectories")
    denoiser = denoiser_of(pipeline)

    def draw(count: int, size: int, hook: Callable[..., None], shown: Reporter | None) -> None:
        with hooked({"": denoiser}, before=hook):
            sample_images(
                pipeline,
                count,
                steps,
                seed,
                scheduler,
                size,
                shown,
                first,
                conditioning=conditioning,
                decode=False,
            )

    other = InputCapture(denoiser)

    def look(*call: Any) -> None:
        other(*call)
        raise Seen

    # A second batch size shows which arguments are per-sample: a table may be as long as the batch.
    other_count = 1 if min(num, batch) > 1 else 2
    with suppress(Seen):
        draw(other_count, other_count, look, None)
    capture = InputCapture(denoiser, other.conditions.by_sample())
    draw(num, batch, capture, reporter)
    _check_called(capture)
    per_batch = torch.cat(capture.timesteps)
    timesteps = per_batch[_first_of_each(per_batch)]
    sizes = [min(batch, num - start) for start in range(0, num, batch)]
    owner, order = _owners(capture.samples, per_batch, timesteps, sizes, batch)
    found = Trajectories(
        torch.cat(capture.samples), per_batch, owner, timesteps, capture.conditions.conditions()
    )
    return found.take(order)


def _check_called(capture: InputCapture) -> None:
    if not capture.samples:
        raise StepQuantError("the sampler never called the denoiser: expected at least one step")


def _owners(
    samples: list[Tensor], timestep: Tensor, timesteps: Tensor, sizes: list[int], batch: int
) -> tuple[Tensor, Tensor]:
    """Return the image of each input, `[N]`, and an order of the inputs, `[N]`.

    The order sorts the inputs by batch, step and image. The sampler calls the denoiser batch by
    batch and, inside a batch, step by step. With guidance each image appears several times at a
    step, in one call or in several. The order puts an image's inputs at a step side by side, so
    that the first inputs of a step include all kinds.

    Raises:
        StepQuantError: the calls do not divide evenly among batches and images.
    """
    calls = len(samples) // len(sizes)
    owners, batches = [], []
    for number, sample in enumerate(samples):
        index = min(number // max(1, calls), len(sizes) - 1)
        copies, rest = divmod(len(sample), sizes[index])
        if rest or calls * len(sizes) != len(samples):
            raise StepQuantError(
                f"the sampler called the denoiser {len(samples)} times, once with {len(sample)} "
                f"samples, for batches of {sizes} images: expected the same number of calls for "
                "each batch, with each image once or several times"
            )
        owners.append((torch.arange(sizes[index]) + index * batch).repeat(copies))
        batches.append(torch.full((len(sample),), index))
    owner, of_batch = torch.cat(owners), torch.cat(batches)
    step = (timestep[:, None] == timesteps[None]).int().argmax(dim=1)
    key = (of_batch * len(timesteps) + step) * len(owner) + owner
    return owner, key.argsort(stable=True)


class Draw(Protocol):
    """Function that samples more trajectories with the sampler of the calibration."""

    def __call__(self, num: int, seed: int, denoiser: nn.Module | None = None) -> Trajectories:
        """Sample `num` trajectories, image `i` from the noise of seed `seed + i`.

        `denoiser` replaces the float model; None keeps it.
        """
        ...


def drawer(
    pipeline: DiffusionPipeline,
    steps: int,
    scheduler: str | None,
    conditioning: Conditioning | None = None,
    batch: int = 64,
) -> Draw:
    """Return a function that samples trajectories with `pipeline`; see `capture_trajectories`.

    The seed selects the conditions, too: image `i` has condition number `seed + i`. A draw can
    therefore continue where the previous one ended.
    """

    def draw(num: int, seed: int, denoiser: nn.Module | None = None) -> Trajectories:
        sampler = pipeline
        if denoiser is not None:
            sampler = ResolvedPipeline.of(pipeline).with_denoiser(denoiser).pipeline
        return capture_trajectories(
            sampler, num, steps, 0, scheduler, batch, conditioning=conditioning, first=seed
        )

    return draw


def _first_of_each(values: Tensor) -> Tensor:
    """Return the index of the first occurrence of each distinct value, in order."""
    seen: dict[float, int] = {}
    for index, value in enumerate(values.tolist()):
        seen.setdefault(value, index)
    return torch.tensor(list(seen.values()))
