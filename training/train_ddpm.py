"""Train an embedded DDPM (`builtin:fashion-ddpm`, `builtin:cifar10-ddpm`) and write its asset.

    python training/train_ddpm.py fashion-ddpm --data DIR --work runs/fashion-ddpm --images 480000

Epsilon prediction on the 1,000-step linear schedule of DDPM (Ho et al. 2020, section 4), with
random flips. Started again, it goes on from its last checkpoint. The asset is a diffusers
`DDPMPipeline` folder with fp16 safetensors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from data import load, scaled
from loop import Copies, Execution, Settings, add_arguments, budget_of, train

MODELS = {
    "fashion-ddpm": {
        "data": "fashion_mnist",
        "unet": {
            "sample_size": 32,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": (32, 64, 96),
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            "norm_num_groups": 8,
            "attention_head_dim": 32,
        },
    },
    "cifar10-ddpm": {
        "data": "cifar10",
        "unet": {
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 1,
            "block_out_channels": (32, 64, 128, 128),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 8,
            "attention_head_dim": 32,
        },
    },
}
GAMMA = 5.0


def loss_weights(weighting: str, alphas_cumprod: Tensor) -> Tensor:
    """The weight of each timestep's squared noise error.

    `uniform` is DDPM's simple loss. `min-snr` is min(SNR, 5) / SNR (Hang et al., ICCV 2023,
    section 3.4): steps with little noise, where the error is largest and matters least, count less.
    """
    if weighting == "uniform":
        return torch.ones_like(alphas_cumprod)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=GAMMA) / snr


def write_pipeline(net: UNet2DModel, folder: Path) -> None:
    """Round `net` to fp16 in place and write it as a pipeline."""
    # Clipping the predicted image, which DDIM's paper does not do, makes DDIM amplify any small
    # error of the denoiser, quantization's among them: docs/explanation/why-it-is-hard.md.
    scheduler = DDPMScheduler(clip_sample=False)
    pipeline = DDPMPipeline(unet=net.to("cpu", torch.float16), scheduler=scheduler)
    pipeline.save_pretrained(folder, safe_serialization=True)


def main() -> None:
    """Parse the command line, train and write the asset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    add_arguments(parser, batch=128, lr=6e-4)
    parser.add_argument("--weighting", choices=("uniform", "min-snr"), default="uniform")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--start",
        type=Path,
        metavar="FOLDER",
        help="begin from this pipeline's weights; has no effect once --work has a checkpoint",
    )
    parser.add_argument(
        "--keep-every",
        type=int,
        metavar="IMAGES",
        help="write a pipeline of the averaged weights to WORK/kept every so many images",
    )
    args = parser.parse_args()
    budget = budget_of(parser, args, "")
    if args.start is not None and not (args.start / "unet").is_dir():
        parser.error(f"'{args.start}' has no folder unet: expected a pipeline's folder as --start")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    spec = MODELS[args.model]
    images = load(spec["data"], args.data)["x_train"].to(device)
    net = UNet2DModel(**spec["unet"]).to(device, memory_format=torch.channels_last)
    if args.start is not None:
        net.load_state_dict(UNet2DModel.from_pretrained(args.start / "unet").state_dict())
    forward = torch.compile(net) if args.compile else net
    scheduler = DDPMScheduler()
    weights = loss_weights(args.weighting, scheduler.alphas_cumprod).to(device)

    def loss_at(rng: torch.Generator) -> Tensor:
        index = torch.randint(len(images), (args.batch,), generator=rng, device=device)
        x0 = scaled(images[index])
        flip = torch.rand(args.batch, 1, 1, 1, generator=rng, device=device) < 0.5
        x0 = torch.where(flip, x0.flip(-1), x0)
        t = torch.randint(1000, (args.batch,), generator=rng, device=device)
        noise = torch.randn(x0.shape, generator=rng, device=device)
        xt = scheduler.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
        errors = (forward(xt, t).sample.float() - noise).square().mean((1, 2, 3))
        return (weights[t] * errors).mean()

    settings = Settings(
        args.batch, args.lr, args.ema, args.seed, args.schedule, weighting=args.weighting
    )
    execution = Execution(args.work, device, args.save_every, args.bf16)
    copies = Copies(args.keep_every, write_pipeline) if args.keep_every else None
    train("denoiser", net, loss_at, settings, budget, execution, copies)
    out = args.out or args.work / "pipeline"
    write_pipeline(net, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
