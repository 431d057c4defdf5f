"""Train an embedded class-conditional DiT (`builtin:fashion-dit`, `cifar10-dit`), write its asset.

    python training/train_dit.py fashion-dit --data DIR --work runs/train-dit \
        --vae runs/train-t2i/vae --minutes 45 --out src/stepquant/assets/fashion-dit

A DiT (Peebles and Xie, ICCV 2023) on the latents of a small autoencoder: `--vae`, or else one that
is trained first. One label in ten is dropped for classifier-free guidance. Started again, it goes
on from its last checkpoint. The asset is a diffusers `DiTPipeline` folder with fp16 safetensors.
"""

from __future__ import annotations

import argparse
import copy

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from assets import card_text, hardware, write_asset
from data import LOADERS, load
from latents import (
    LATENT_CHANNELS,
    add_autoencoder_arguments,
    autoencoder_run,
    prepare,
    reconstruction_psnr,
)
from loop import Execution, Settings, add_arguments, budget_of, train

NULL = 1000  # the label of no class: `DiTPipeline` knows no other
DROPPED = 0.1
GUIDANCE = 3.0
MODELS = {
    "fashion-dit": {
        "data": "fashion_mnist",
        "transformer": {
            "sample_size": 8,
            "patch_size": 2,
            "num_layers": 6,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
        },
    },
    "cifar10-dit": {
        "data": "cifar10",
        "transformer": {
            "sample_size": 16,
            "patch_size": 2,
            "num_layers": 8,
            "num_attention_heads": 5,
            "attention_head_dim": 32,
        },
    },
}


def build(sizes: dict[str, int]) -> DiTTransformer2DModel:
    """The untrained transformer, with the paper's initialisation and one embedding for all blocks.

    diffusers has an embedding of time and label in each block, where the paper has one: they are
    tied while training. Blocks start as the identity (section 3.2, adaLN-Zero).
    """
    net = DiTTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_embeds_ada_norm=NULL,
        **sizes,
    )
    first = net.transformer_blocks[0].norm1.emb
    nn.init.normal_(first.class_embedder.embedding_table.weight, std=0.02)
    for block in net.transformer_blocks:
        block.norm1.emb = first
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (net.proj_out_1, net.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net


@torch.no_grad()
def untie(net: DiTTransformer2DModel, classes: int) -> None:
    """Give each block its own embedding, and each of the 1,000 labels a class: its remainder."""
    table = net.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    table[:NULL] = table[torch.arange(NULL, device=table.device) % classes]
    for block in net.transformer_blocks[1:]:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)


def main() -> None:
    """Parse the command line, train and write the asset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    add_arguments(parser, batch=128, lr=1e-3)
    add_autoencoder_arguments(parser)
    args = parser.parse_args()
    budget = budget_of(parser, args, "")
    vae_budget = None if args.vae else budget_of(parser, args, "vae-")
    spec = MODELS[args.model]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load(spec["data"], args.data)
    vae, latents = prepare(args, spec["data"], data, vae_budget, device)
    classes = LOADERS[spec["data"]][1]
    torch.manual_seed(args.seed)  # the same start, whether the autoencoder was trained before
    # In evaluation mode: in training, each block would drop labels of its own choice.
    net = build(spec["transformer"]).to(device).eval()
    scheduler = DDIMScheduler(clip_sample=False)

    def loss_at(rng: torch.Generator) -> Tensor:
        z, labels = latents.draw(args.batch, rng)
        dropped = torch.rand(labels.shape, generator=rng, device=device) < DROPPED
        t = torch.randint(1000, labels.shape, generator=rng, device=device)
        noise = torch.randn(z.shape, generator=rng, device=device)
        prediction = net(
            scheduler.add_noise(z, noise, t),
            timestep=t,
            class_labels=torch.where(dropped, NULL, labels),
        ).sample
        return (prediction.float() - noise).square().mean()

    settings = Settings(args.batch, args.lr, args.ema, args.seed, args.schedule)
    execution = Execution(args.work, device, args.save_every, args.bf16)
    run = train("denoiser", net, loss_at, settings, budget, execution)
    untie(net, len(classes))
    pipeline = DiTPipeline(transformer=net, vae=vae, scheduler=scheduler)
    conditions = {
        "guidance": GUIDANCE,
        "names": classes,
        "classes": [*range(len(classes))],
        "labels": [*range(len(classes))],
    }
    run.update(
        batch=args.batch,
        hardware=hardware(device),
        settings=f"Adam, peak learning rate {args.lr}, average {args.ema}, seed {args.seed}, "
        "one label in ten dropped, predicts the noise",
    )
    card = card_text(
        args.model,
        "A small class-conditional latent DiT of 32 x 32 pictures, a diffusers `DiTPipeline`. That "
        "pipeline's\nlabel of no class is 1000, so there are 1,000 labels: `k` means class "
        f"`k % {len(classes)}`.",
        spec["data"],
        {"transformer": net, "autoencoder": vae},
        run,
        autoencoder_run(args.work),
        reconstruction_psnr(vae, data["x_test"][::5], device),
    )
    write_asset(pipeline.to("cpu"), conditions, card, args.out or args.work / "pipeline", args.work)


if __name__ == "__main__":
    main()
