"""The tiny pipelines with random weights that `compare_commits.py` quantizes."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class Model:
    """A tiny pipeline, the bits of weights and activations, and what all functions are told.

    `components`: what is quantized beside the denoiser. `ranges`: instead of the recipes' own.
    """

    build: Callable[[], DiffusionPipeline]
    denoiser: str
    bits: tuple[int, int]
    conditions: Mapping[str, Any] = field(default_factory=dict)
    components: Mapping[str, str] = field(default_factory=dict)
    ranges: str | None = None


def unconditional() -> DiffusionPipeline:
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    )
    return DDPMPipeline(unet=with_weights(unet), scheduler=DDPMScheduler())


def text_to_image() -> DiffusionPipeline:
    letters = string.ascii_lowercase
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {name: number for number, name in enumerate(names)}
    encoder = CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=24,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(encoder).eval(),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8),
        unet=with_weights(unet),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def class_to_image() -> DiffusionPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,  # the pipeline knows no other number of classes
    )
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return DiTPipeline(transformer=with_weights(transformer), vae=vae(), scheduler=scheduler)


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
    ).eval()


def with_weights(denoiser: nn.Module) -> nn.Module:
    """Input channels of different strength, norms unlike the identity, nothing that is zero.

    Scalings then have something to do, and a wrong fold changes the result.
    """
    for module in denoiser.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            strength = (0.5 * torch.randn(module.weight.shape[1])).exp()
            module.weight.data.mul_(strength.view(1, -1, *(1,) * (module.weight.dim() - 2)))
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
    return denoiser.eval()


MODELS = {
    "unet": Model(unconditional, "unet", (4, 4)),
    "text": Model(
        text_to_image,
        "unet",
        (3, 8),
        {"prompts": ["a cat", "boat"], "guidance": 3.0},
        {"vae": "w8", "text_encoder": "w8"},
        "minmax",  # the search takes long for so many layers
    ),
    "dit": Model(class_to_image, "transformer", (4, 8), {"labels": [3, 7], "guidance": 2.0}),
}
