"""The published CIFAR-10 DDPM architecture (Ho et al. 2020, 35.7 M parameters), random weights."""

from __future__ import annotations

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel


def paper_pipeline(seed: int = 0) -> DDPMPipeline:
    """`google/ddpm-cifar10-32`'s architecture with random weights: good for size and speed."""
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_num_groups=32,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return DDPMPipeline(unet.eval().requires_grad_(False), DDPMScheduler(1000))
