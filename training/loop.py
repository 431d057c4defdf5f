"""What every training of latent models shares: budget, learning rate, average, checkpoints."""

from __future__ import annotations

import argparse
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
    """What a resumed run must have in common with the one before it."""

    batch: int
    lr: float
    ema: float
    seed: int
    bf16: bool


def add_arguments(parser: argparse.ArgumentParser, batch: int, lr: float) -> None:
    """The arguments that the scripts have in common."""
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the image sets")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and the log go here")
    parser.add_argument("--out", type=Path, help="write the finished pipeline here")
    parser.add_argument("--vae", type=Path, help="a trained autoencoder's folder; else train one")
    parser.add_argument("--minutes", type=float, help="wall clock for the denoiser, resumed or not")
    parser.add_argument("--images", type=int, help="images that the denoiser sees in all")
    parser.add_argument("--vae-minutes", type=float, help="wall clock for the autoencoder")
    parser.add_argument("--vae-images", type=int, help="images that the autoencoder sees in all")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="autocast; gains on GPUs")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")


def budget_of(parser: argparse.ArgumentParser, args: argparse.Namespace, prefix: str) -> Budget:
    """The budget from `--PREFIXminutes` and `--PREFIXimages`, of which one is needed."""
    name = prefix.replace("-", "_")
    budget = Budget(getattr(args, f"{name}images"), getattr(args, f"{name}minutes"))
    if not budget.images and not budget.minutes:
        parser.error(f"there is no budget: expected --{prefix}minutes or --{prefix}images")
    return budget


def learning_rate(step: int, spent: float, peak: float) -> float:
    """Linear warm-up over steps, times a cosine decay to zero over the budget."""
    return peak * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * spent))


def train(
    name: str,
    net: nn.Module,
    loss_at: Callable[[torch.Generator], Tensor],
    settings: Settings,
    budget: Budget,
    folder: Path,
    save_every: int,
    device: str,
) -> dict[str, float]:
    """Train `net` in place until the budget is spent, and leave the averaged weights in it.

    `loss_at` draws a batch with the generator that it is given and returns the loss, a scalar. One
    generator for each step makes a resumed run draw what the uninterrupted one would have.
    `folder/NAME.safetensors` is the checkpoint, `folder/NAME.jsonl` the log. Returns `steps`,
    `images`, `loss` (a running mean) and `minutes`.
    """
    parameters = dict(net.named_parameters())  # tied ones once
    average = {key: value.detach().clone() for key, value in parameters.items()}
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.lr, fused=True)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{name}.safetensors"
    state: dict[str, float] = {"steps": 0, "seconds": 0.0, "loss": math.nan}
    if checkpoint.exists():
        state = _load(checkpoint, settings, parameters, average, optimizer, device)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(name, total=1.0, note="")
        before, started = state["seconds"], time.monotonic()
        while (spent := budget.spent(state["steps"] * settings.batch, state["seconds"])) < 1:
            step = int(state["steps"])
            rng = torch.Generator(device).manual_seed(settings.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, spent, settings.lr)
            with torch.autocast(device, torch.bfloat16, enabled=settings.bf16):
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
            spent = budget.spent(state["steps"] * settings.batch, state["seconds"])
            bar.update(task, completed=spent, note=f"step {step + 1} loss {state['loss']:.4f}")
            if (step + 1) % save_every == 0 or spent >= 1:
                _save(checkpoint, settings, parameters, average, optimizer, state)
                record = {**state, "left_s": state["seconds"] * (1 / spent - 1)}
                with open(folder / f"{name}.jsonl", "a") as log:
                    log.write(json.dumps(record) + "\n")
                if not console.is_terminal:  # where there is no bar to look at
                    print(name, json.dumps(record), flush=True)
    with torch.no_grad():
        for key, value in parameters.items():
            value.copy_(average[key])
    return {
        "steps": int(state["steps"]),
        "images": int(state["steps"]) * settings.batch,
        "loss": state["loss"],
        "minutes": state["seconds"] / 60,
    }


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
