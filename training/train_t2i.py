"""Train an embedded text-to-image model (`builtin:fashion-t2i`, `cifar10-t2i`), write its asset.

    python training/train_t2i.py fashion-t2i --data DIR --work runs/train-t2i \
        --vae-minutes 15 --minutes 35 --out src/stepquant/assets/fashion-t2i

Stable Diffusion's parts (Rombach et al. 2022), small: an autoencoder is trained first, then the
UNet and CLIP's text encoder together on prompts made of class names; one prompt in ten is empty,
for classifier-free guidance (Ho and Salimans 2022). Started again, it goes on from its last
checkpoint. The asset is a diffusers `StableDiffusionPipeline` folder with fp16 safetensors.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

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
from prompts import TEMPLATES, TOKENS, build_tokenizer, prompts_of

WIDTH = 64  # of the prompt's embedding
EMPTY = 0.1  # share of prompts that are dropped
GUIDANCE = 2.5
ATTENTION = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
MODELS = {
    "fashion-t2i": {
        "data": "fashion_mnist",
        "unet": {"sample_size": 8, "block_out_channels": (48, 96), "attention_head_dim": 2},
    },
    "cifar10-t2i": {
        "data": "cifar10",
        "unet": {"sample_size": 16, "block_out_channels": (80, 144), "attention_head_dim": 4},
    },
}


def text_encoder(vocabulary: int) -> CLIPTextModel:
    """CLIP's text encoder, small, for `build_tokenizer`'s numbers of beginning and end."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def main() -> None:
    """Parse the command line, train the parts and write the asset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    add_arguments(parser, batch=64, lr=8e-4)
    add_autoencoder_arguments(parser)
    args = parser.parse_args()
    budget = budget_of(parser, args, "")
    vae_budget = None if args.vae else budget_of(parser, args, "vae-")
    spec = MODELS[args.model]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load(spec["data"], args.data)
    vae, latents = prepare(args, spec["data"], data, vae_budget, device)

    classes = LOADERS[spec["data"]][1]
    texts = [text for name in classes for text in prompts_of(name)]  # [classes * templates]
    tokenizer = build_tokenizer(texts)
    padded = tokenizer(["", *texts], padding="max_length", truncation=True, return_tensors="pt")
    ids = padded.input_ids.to(device)  # [1 + classes * templates, TOKENS], the empty one first
    torch.manual_seed(args.seed)  # the same start, whether the autoencoder was trained before
    unet = UNet2DConditionModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        **ATTENTION,
        **spec["unet"],
    )
    net = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder(len(tokenizer))}).to(device)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )

    def loss_at(rng: torch.Generator) -> Tensor:
        z, labels = latents.draw(args.batch, rng)
        template = torch.randint(len(TEMPLATES), labels.shape, generator=rng, device=device)
        empty = torch.rand(labels.shape, generator=rng, device=device) < EMPTY
        prompt = torch.where(empty, 0, 1 + labels * len(TEMPLATES) + template)
        t = torch.randint(1000, labels.shape, generator=rng, device=device)
        noise = torch.randn(z.shape, generator=rng, device=device)
        # All prompts are fewer than two batches have: encode each once.
        hidden = net["text_encoder"](ids)[0][prompt]  # [B, TOKENS, WIDTH]
        prediction = net["unet"](scheduler.add_noise(z, noise, t), t, hidden).sample
        return (prediction.float() - noise).square().mean()

    settings = Settings(args.batch, args.lr, args.ema, args.seed, args.schedule)
    execution = Execution(args.work, device, args.save_every, args.bf16)
    run = train("denoiser", net, loss_at, settings, budget, execution)

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=net["text_encoder"].eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # Template by template, so that any first part has all classes alike.
    by_template = list(zip(*(prompts_of(name) for name in classes), strict=True))
    conditions = {
        "guidance": GUIDANCE,
        "names": classes,
        "classes": [*range(len(classes))] * len(by_template),
        "prompts": [text for texts in by_template for text in texts],
    }
    run.update(
        batch=args.batch,
        hardware=hardware(device),
        settings=f"Adam, peak learning rate {args.lr}, average {args.ema}, seed {args.seed}, "
        f"one prompt in ten empty, predicts the noise",
    )
    card = card_text(
        args.model,
        "A small latent text-to-image model of 32 x 32 pictures, a diffusers "
        "`StableDiffusionPipeline`\nwith a text encoder and a tokenizer of its own.",
        spec["data"],
        {"UNet": unet, "text encoder": net["text_encoder"], "autoencoder": vae},
        run,
        autoencoder_run(args.work),
        reconstruction_psnr(vae, data["x_test"][::5], device),
    )
    write_asset(pipeline.to("cpu"), conditions, card, args.out or args.work / "pipeline", args.work)


if __name__ == "__main__":
    main()
