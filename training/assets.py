"""What the scripts write beside a latent model's weights: conditions, sample images, the card."""

from __future__ import annotations

import json
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.sampling import sample_images
from stepquant.reporting.images import save_grid

SOURCES = {
    "fashion_mnist": (
        "Fashion-MNIST's 60,000 training images (Xiao, Rasul, Vollgraf 2017; MIT licence, Zalando "
        "SE), 28 x 28 grey,\n  padded with black to 32 x 32, and their mirror images"
    ),
    "cifar10": (
        "CIFAR-10's 50,000 training images (Krizhevsky 2009; no formal licence, and none of them "
        "is in this package),\n  32 x 32 in colour, and their mirror images"
    ),
}
ROWS = 6  # of sample images, a column for each class
STEPS = 50


def parameters(module: nn.Module) -> int:
    """How many parameters `module` has."""
    return sum(value.numel() for value in module.parameters())


def write_asset(
    pipeline: DiffusionPipeline, conditions: dict[str, Any], card: str, out: Path, work: Path
) -> None:
    """Write the fp16 pipeline with `conditions.json` and `README.md` to `out`, samples to `work`.

    `conditions`: `guidance`, `prompts` or `labels`, `classes`, the class of each of these, and
    `names`, those of the classes; the first entries have one of each class.
    """
    pipeline.to(torch.float16).save_pretrained(out, safe_serialization=True)
    for file in out.glob("*/config.json"):  # where a part was loaded from says nothing elsewhere
        config = {k: v for k, v in json.loads(file.read_text()).items() if k != "_name_or_path"}
        file.write_text(json.dumps(config, indent=2) + "\n")
    (out / "conditions.json").write_text(json.dumps(conditions, indent=1) + "\n")
    (out / "README.md").write_text(card)
    print(f"wrote {out}")
    # As it will be loaded: fp16 on disk, computed in float32.
    pipeline = DiffusionPipeline.from_pretrained(out, dtype=torch.float32)
    columns = len(set(conditions["classes"]))
    drawn = {
        name: conditions[name][:columns] for name in ("prompts", "labels") if name in conditions
    }
    conditioning = Conditioning.of(**drawn, guidance=conditions["guidance"])
    images = sample_images(pipeline, ROWS * columns, STEPS, conditioning=conditioning)
    print(f"wrote {save_grid(images, work / 'samples.png', columns)}")


def card_text(
    title: str,
    what: str,
    data: str,
    networks: dict[str, nn.Module],
    denoiser: dict[str, Any],
    vae: dict[str, Any] | None,
    psnr: float,
) -> str:
    """The model card. `denoiser`, `vae`: what `loop.train` returned, and `settings`, a text.

    `psnr`: of test images through the autoencoder, in dB. `vae` is None where it was given.
    """
    sizes = ", ".join(f"{name} {parameters(net):,}" for name, net in networks.items())
    lines = [f"# {title}", "", what, ""]
    lines += [f"- **Size**: {sum(map(parameters, networks.values())):,} parameters ({sizes})."]
    lines += [f"- **Data**: {SOURCES[data]}."]
    if vae is not None:
        lines += [
            f"- **Autoencoder**: {vae['steps']:,} steps of {vae['batch']} images in "
            f"{vae['minutes']:.0f} minutes, loss {vae['loss']:.4f}."
        ]
    lines += [
        f"- **Denoiser**: {denoiser['steps']:,} steps of {denoiser['batch']} images in "
        f"{denoiser['minutes']:.0f} minutes, running mean of the loss {denoiser['loss']:.4f};\n"
        f"  {denoiser['settings']}.",
        f"- **Hardware**: {denoiser['hardware']}, torch {torch.__version__}. Command:",
        "",
        f"      {command(sys.argv)}",
        "",
        f"- **Measured**: 2,000 test images through the autoencoder have {psnr:.1f} dB of PSNR.",
        "- **Conditions**: `conditions.json` has the conditions that it was trained with, the\n"
        "  class of each, and the scale of guidance that its samples are drawn with.",
        "- **Limits**: a small model to quantize and compare; it draws nothing but these ten "
        "classes.",
    ]
    return "\n".join(lines) + "\n"


def command(words: list[str]) -> str:
    """The command line, with folders of this machine replaced by what they are for."""
    places = {f"--{name}": name.upper() for name in ("data", "work", "out", "vae")}
    told = [places.get(before, word) for before, word in pairwise(words)]
    return f"python training/{Path(words[0]).name} {shlex.join(told)}"


def hardware(device: str) -> str:
    """The machine in words, for the card."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU thread(s)"
