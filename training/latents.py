"""The autoencoder that the latent models share: its training, and the latents of a data set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from data import scaled
from loop import Budget, Execution, Settings, train

LATENT_CHANNELS = 4
# Enough to keep latents near a normal distribution; more of it blurs the images.
KL_WEIGHT = 1e-3
BATCH = 32  # small: an autoencoder gains by steps more than by images
PEAK = 1e-3
SIZES: dict[str, dict[str, Any]] = {
    "fashion_mnist": {"channels": 1, "widths": (16, 32, 64)},  # 32 x 32 to 8 x 8
    # Coloured photographs lose too much in 8 x 8 latents of four channels: 16 x 16.
    "cifar10": {"channels": 3, "widths": (48, 96)},
}


def add_autoencoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of scripts that take or train an autoencoder."""
    parser.add_argument("--vae", type=Path, help="a trained autoencoder's folder; else train one")
    parser.add_argument("--vae-minutes", type=float, help="wall clock for the autoencoder")
    parser.add_argument("--vae-images", type=int, help="images that the autoencoder sees in all")


def build(data: str) -> AutoencoderKL:
    """The untrained autoencoder for the images of `data`."""
    channels, widths = SIZES[data]["channels"], SIZES[data]["widths"]
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        sample_size=32,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def vae_loss(vae: AutoencoderKL, x: Tensor, rng: torch.Generator) -> Tensor:
    """L1 of the image and of its differences between neighbours, and a small KL term.

    The differences keep edges that L1 alone would blur.
    """
    posterior = vae.encode(x).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=rng, device=x.device)
    error = vae.decode(posterior.mean + posterior.std * noise).sample.float() - x
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges + KL_WEIGHT * posterior.kl().mean() / noise[0].numel()


def autoencoder(
    args: argparse.Namespace, data: str, images: Tensor, budget: Budget | None, device: str
) -> AutoencoderKL:
    """The autoencoder of `--vae`, or of `WORK/vae`, which is trained unless it is there.

    The weights are those that ship, rounded to fp16, and `scaling_factor` brings the latents of
    `images` (uint8 `[N, C, 32, 32]`) to unit variance.
    """
    folder = args.vae or args.work / "vae"
    if args.vae is not None and not (folder / "config.json").exists():
        raise SystemExit(
            f"'{folder}' has no config.json: expected an autoencoder's folder as --vae"
        )
    if not (folder / "config.json").exists():
        vae = build(data).to(device, memory_format=torch.channels_last)
        settings = Settings(BATCH, PEAK, args.ema, args.seed)

        def loss_at(rng: torch.Generator) -> Tensor:
            index = torch.randint(len(images), (BATCH,), generator=rng, device=device)
            x = scaled(images[index]).contiguous(memory_format=torch.channels_last)
            return vae_loss(vae, x, rng)

        assert budget is not None, "a budget is asked for where no --vae is given"
        execution = Execution(args.work, device, args.save_every, args.bf16)
        run = train("vae", vae, loss_at, settings, budget, execution)
        vae = vae.half().float().eval()
        means, _ = encode(vae, images[::12], device)  # sorted by label: of all classes
        vae.register_to_config(scaling_factor=float(1 / means.float().std()))
        vae.half().save_pretrained(folder, safe_serialization=True)
        (args.work / "vae.json").write_text(json.dumps(run) + "\n")
    vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32).to(device)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents of uint8 `images`, each fp16 `[N, 4, h, w]`."""
    means, deviations = [], []
    for part in images.split(500):
        x = scaled(part.to(device)).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        means.append(posterior.mean.half())
        deviations.append(posterior.std.half())
    return torch.cat(means), torch.cat(deviations)


class Latents:
    """Latents of a data set and of its mirror images, with their labels, to draw batches from."""

    def __init__(self, vae: AutoencoderKL, images: Tensor, labels: Tensor, device: str) -> None:
        both = [encode(vae, part, device) for part in (images, images.flip(-1))]
        self.mean, self.deviation = (torch.cat(parts) for parts in zip(*both, strict=True))
        self.labels = torch.cat([labels, labels]).to(device)
        self.scale = vae.config.scaling_factor

    def draw(self, batch: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """A batch, sampled from the posterior and scaled: `[batch, 4, h, w]`, labels `[batch]`."""
        index = torch.randint(len(self.labels), (batch,), generator=rng, device=rng.device)
        mean = self.mean[index].float()
        noise = torch.randn(mean.shape, generator=rng, device=rng.device)
        return (mean + self.deviation[index].float() * noise) * self.scale, self.labels[index]


def prepare(
    args: argparse.Namespace,
    name: str,
    data: dict[str, Tensor],
    budget: Budget | None,
    device: str,
) -> tuple[AutoencoderKL, Latents]:
    """The autoencoder for the data set `name`, and the latents of its training images."""
    torch.manual_seed(args.seed)
    vae = autoencoder(args, name, data["x_train"].to(device), budget, device)
    return vae, Latents(vae, data["x_train"], data["y_train"], device)


def autoencoder_run(work: Path) -> dict[str, float] | None:
    """What the training of the autoencoder in `work` returned, for the card; None without one."""
    record = work / "vae.json"
    return {**json.loads(record.read_text()), "batch": BATCH} if record.exists() else None


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: Tensor, device: str) -> float:
    """PSNR in dB of uint8 `images` that went through the autoencoder's mean, over all pixels."""
    errors = []
    for part in images.split(500):
        x = scaled(part.to(device)).contiguous(memory_format=torch.channels_last)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((y - x).div(2).square().mean((1, 2, 3)))
    return float(-10 * torch.cat(errors).mean().log10())
