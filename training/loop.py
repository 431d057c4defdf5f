"""The training loop of all diffusion models: budget, learning rate, average, checkpoints."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WARMUP = 200  # steps
AVERAGE = "ema"
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's state of a parameter
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class Budget:
    """Images seen or minutes of wall clock in all, resumed parts included: what ends first."""

    images: int | None
    minutes: float | None

    def spent(self, images: int, seconds: float) -> float:
        """Share of the budget that is gone, 0 to 1."""
        shares = [images / self.images] if self.images else []
        shares += [seconds / (60 * self.minutes)] if self.minutes else []
        return min(1.0, max(shares))


@dataclass(frozen=True)
class Settings:
    """Settings that a resumed run must share with the run before it."""

    batch: int
    lr: float
    ema: float
    seed: int
    schedule: str = "cosine"
    weighting: str = "uniform"  # of the loss, which `loss_at` applies


@dataclass(frozen=True)
class Execution:
    """Where and how a run computes; a resumed run may choose anew."""

    folder: Path
    device: str
    save_every: int  # steps
    bf16: bool


@dataclass(frozen=True)
class Copies:
    """Copies of the averaged model: one each time that another `every` images have been seen."""

    every: int
    write: Callable[[nn.Module, Path], None]  # may change the module that it is given


def add_arguments(parser: argparse.ArgumentParser, batch: int, lr: float) -> None:
    """Add the arguments that all scripts share."""
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the image sets")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and the log go here")
    parser.add_argument("--out", type=Path, help="write the finished pipeline here")
    parser.add_argument("--minutes", type=float, help="wall clock for the denoiser, resumed or not")
    parser.add_argument("--images", type=int, help="images that the denoiser sees in all")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="learning rate")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="autocast, for GPUs and CPUs with AMX")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")


def budget_of(parser: argparse.ArgumentParser, args: argparse.Namespace, prefix: str) -> Budget:
    """The budget from `--PREFIXminutes` and `--PREFIXimages`, of which one is needed."""
    name = prefix.replace("-", "_")
    budget = Budget(getattr(args, f"{name}images"), getattr(args, f"{name}minutes"))
    if not budget.images and not budget.minutes:
        parser.error(f"there is no budget: expected --{prefix}minutes or --{prefix}images")
    return budget


def learning_rate(step: int, spent: float, settings: Settings) -> float:
    """Linear warm-up over steps; then constant, or a cosine decay to zero over the budget."""
    warm = settings.lr * min(1.0, (step + 1) / WARMUP)
    return warm if settings.schedule == "constant" else warm * 0.5 * (1 + math.cos(math.pi * spent))


def train(
    name: str,
    net: nn.Module,
    loss_at: Callable[[torch.Generator], Tensor],
    settings: Settings,
    budget: Budget,
    execution: Execution,
    copies: Copies | None = None,
) -> dict[str, float]:
    """Train `net` in place until the budget is spent, and leave the averaged weights in it.

    `loss_at` draws a batch with the generator that it is given and returns the loss, a scalar. One
    generator for each step makes a resumed run draw what the uninterrupted one would have.
    `folder/NAME.safetensors` is the checkpoint, `folder/NAME.jsonl` the log, and
    `folder/kept/IMAGES` a copy of the averaged model. Returns `steps`, `images`, `loss` (a running
    mean) and `minutes`.
    """
    folder, device = execution.folder, execution.device
    parameters = dict(net.named_parameters())  # tied ones once
    average = {key: value.detach().clone() for key, value in parameters.items()}
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.lr, fused=True)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{name}.safetensors"
    state: dict[str, float] = {"steps": 0, "seconds": 0.0, "loss": math.nan}
    if checkpoint.exists():
        state = _load(checkpoint, settings, parameters, average, optimizer, device)
    console = Console()

    def write_log(record: dict[str, float | str]) -> None:
        with open(folder / f"{name}.jsonl", "a") as log:
            log.write(json.dumps(record) + "\n")
        if not console.is_terminal:  # where there is no bar to look at
            print(name, json.dumps(record), flush=True)

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(name, total=1.0, note="")
        before, started = state["seconds"], time.monotonic()
        while (spent := budget.spent(state["steps"] * settings.batch, state["seconds"])) < 1:
            step = int(state["steps"])
            rng = torch.Generator(device).manual_seed(settings.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, spent, settings)
            with torch.autocast(device, torch.bfloat16, enabled=execution.bf16):
                loss = loss_at(rng)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            # The average starts short so that early steps do not weigh on it.
            decay = min(settings.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                targets = [average[key] for key in parameters]
                torch._foreach_lerp_(targets, list(parameters.values()), 1 - decay)
            now = loss.item()
            state["loss"] = now if step == 0 else 0.99 * state["loss"] + 0.01 * now
            state["steps"] = step + 1
            state["seconds"] = before + time.monotonic() - started
            images = (step + 1) * settings.batch
            spent = budget.spent(images, state["seconds"])
            bar.update(task, completed=spent, note=f"step {step + 1} loss {state['loss']:.4f}")
            # Before the checkpoint: a run that is killed while it copies copies again.
            if copies is not None and images % copies.every < settings.batch:
                averaged = copy.deepcopy(net)
                _assign(averaged, average)
                path = folder / "kept" / str(images)
                copies.write(averaged, path)
                write_log({**state, "kept": str(path)})
            if (step + 1) % execution.save_every == 0 or spent >= 1:
                _save(checkpoint, settings, parameters, average, optimizer, state)
                write_log({**state, "left_s": state["seconds"] * (1 / spent - 1)})
    _assign(net, average)
    return {
        "steps": int(state["steps"]),
        "images": int(state["steps"]) * settings.batch,
        "loss": state["loss"],
        "minutes": state["seconds"] / 60,
    }


@torch.no_grad()
def _assign(net: nn.Module, values: dict[str, Tensor]) -> None:
    """Overwrite the parameters of `net` with `values`."""
    for key, parameter in net.named_parameters():
        parameter.copy_(values[key])


def _save(
    path: Path,
    settings: Settings,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict[str, float],
) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old or the new one."""
    tensors = {}
    for key, value in parameters.items():
        tensors[f"net.{key}"] = value.detach()
        tensors[f"{AVERAGE}.{key}"] = average[key]
        for moment in MOMENTS:
            tensors[f"{moment}.{key}"] = optimizer.state[value][moment]
    tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
    metadata = {"settings": json.dumps(asdict(settings)), "state": json.dumps(state)}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


@torch.no_grad()
def _load(
    path: Path,
    settings: Settings,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    device: str,
) -> dict[str, float]:
    """Put a checkpoint back where it came from; how far it was."""
    with safe_open(path, "pt", device=device) as file:
        metadata = file.metadata()
        found = json.loads(metadata["settings"])
        if found != asdict(settings):
            raise SystemExit(
                f"'{path}' was trained with {found}: expected {asdict(settings)}; give the same "
                "settings, or another --work"
            )
        state: dict[str, float] = json.loads(metadata["state"])
        for key, value in parameters.items():
            value.copy_(file.get_tensor(f"net.{key}"))
            average[key].copy_(file.get_tensor(f"{AVERAGE}.{key}"))
            moments = {moment: file.get_tensor(f"{moment}.{key}") for moment in MOMENTS}
            step = torch.tensor(float(state["steps"]), device=device)
            optimizer.state[value] = {"step": step, **moments}
    return state
