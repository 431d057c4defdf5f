"""Train an embedded DDPM (`builtin:fashion-ddpm`, `builtin:cifar10-ddpm`) and write its asset.

    python training/train_ddpm.py fashion-ddpm --data DIR --work runs/fashion-ddpm --images 480000

Epsilon prediction on the 1,000-step linear schedule of DDPM (Ho et al. 2020, section 4), Adam with
cosine decay and warm-up, exponential moving average of the weights. The run checkpoints every
`--save-every` optimizer steps and goes on from the last checkpoint when started again. The asset
is a diffusers `DDPMPipeline` folder with fp16 safetensors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from rich.progress import track

from data import load

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
            "layers_per_block": 2,
            "block_out_channels": (48, 80, 128),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 16,
            "attention_head_dim": 40,
        },
    },
}


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then cosine decay to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a training checkpoint so that a kill at any moment leaves the old or the new one."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the image sets")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and the log go here")
    parser.add_argument("--out", type=Path, help="write the finished pipeline here")
    parser.add_argument("--images", type=int, default=480_000, help="images seen in all")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    spec = MODELS[args.model]
    images = load(spec["data"], args.data)["x_train"].to(device)
    net = UNet2DModel(**spec["unet"]).to(device, memory_format=torch.channels_last)
    ema = {name: value.detach().clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    alphas = scheduler.alphas_cumprod.to(device)
    steps = args.images // args.batch
    first = 0
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        ema, first = state["ema"], state["step"]
    forward = torch.compile(net) if args.compile else net

    running, started = None, time.time()
    for step in track(range(first, steps), description=args.model, total=steps - first):
        # One generator per step makes a resumed run draw what the uninterrupted one would have.
        rng = torch.Generator(device).manual_seed(args.seed * 1_000_003 + step)
        index = torch.randint(len(images), (args.batch,), generator=rng, device=device)
        x0 = images[index].float() / 127.5 - 1
        flip = torch.rand(args.batch, 1, 1, 1, generator=rng, device=device) < 0.5
        x0 = torch.where(flip, x0.flip(-1), x0)
        t = torch.randint(1000, (args.batch,), generator=rng, device=device)
        noise = torch.randn(x0.shape, generator=rng, device=device)
        a = alphas[t].view(-1, 1, 1, 1)
        xt = (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr)
        with torch.autocast(device, torch.bfloat16):
            prediction = forward(xt, t).sample
        loss = (prediction.float() - noise).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        # The average starts short so that early steps do not weigh on it.
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in net.state_dict().items():
                ema[name].lerp_(value, 1 - decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            state = {
                "net": net.state_dict(),
                "ema": ema,
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            save_checkpoint(checkpoint, state)
            rate = (step + 1 - first) * args.batch / (time.time() - started)
            record = {"step": step + 1, "of": steps, "loss": running, "images_per_s": rate}
            with open(args.work / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
    net.load_state_dict(ema)
    out = args.out or args.work / "pipeline"
    # Clipping the predicted image, which DDIM's paper does not do, makes DDIM amplify any small
    # error of the denoiser, quantization's among them: docs/explanation/why-it-is-hard.md.
    scheduler.register_to_config(clip_sample=False)
    pipeline = DDPMPipeline(unet=net.to("cpu", torch.float16), scheduler=scheduler)
    pipeline.save_pretrained(out, safe_serialization=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
