"""diffusers' `PixArtTransformer2DModel`: PixArt-alpha and -sigma (Chen et al. 2023, 2024)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding
from torch import nn

from stepquant.models.adapter import register_adapter
from stepquant.models.dit import DiTAdapter
from stepquant.models.inputs import MIDDLE, TOKENS, Inputs, noise, random_sample
from stepquant.models.modulation import Modulation


@register_adapter
class PixArtAdapter(DiTAdapter):
    """As DiT, but one time embedding modulates all blocks, and a projection of the prompt.

    Each block adds a table of its own to the modulation, which is no layer and stays float.
    """

    architecture = "PixArtTransformer2DModel"
    units = (BasicTransformerBlock, TimestepEmbedding, PixArtAlphaTextProjection)
    outer = ("pos_embed.proj", "proj_out")

    def blocks(self, model: nn.Module) -> list[str]:
        """As DiT, without the embeddings of the picture's size, which are not trained.

        They are called with all sizes in one row after another, two for each sample.
        """
        return [
            name
            for name in super().blocks(model)
            if not name.endswith(("resolution_embedder", "aspect_ratio_embedder"))
        ]

    def modulations(self, model: nn.Module) -> list[Modulation]:
        """None: one linear layer modulates the norms of all blocks."""
        return []

    def random_inputs(self, model: nn.Module, batch: int) -> Inputs:
        """A sample with a timestep for each image, a prompt's embedding, and the picture's size."""
        config = model.config
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if model.use_additional_conditions:
            added = {"resolution": torch.full((batch, 2), 1024.0)}
            added["aspect_ratio"] = torch.ones(batch, 1)
        conditions = {
            "encoder_hidden_states": noise(
                batch, TOKENS, config.caption_channels or config.cross_attention_dim
            ),
            "encoder_attention_mask": torch.ones(batch, TOKENS),
            "added_cond_kwargs": added,
        }
        return random_sample(model, batch), torch.full((batch,), MIDDLE), conditions
