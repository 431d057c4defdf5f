"""diffusers' `PixArtTransformer2DModel`: PixArt-alpha and -sigma (Chen et al. 2023, 2024)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding
from torch import nn

from stepquant.models.adapter import register_adapter
from stepquant.models.base import Foreign
from stepquant.models.dit import DiTAdapter
from stepquant.models.inputs import MIDDLE, TOKENS, Inputs, noise, random_sample
from stepquant.models.modulation import Modulation


@register_adapter
class PixArtAdapter(DiTAdapter):
    """Adapter for PixArt: as DiT, but one time embedding modulates all blocks.

    The projection of the prompt is a unit too. Each block adds its own table to the modulation. The
    table is not a layer and stays float.
    """

    architecture = "PixArtTransformer2DModel"
    units: ClassVar[tuple[type[nn.Module], ...]] = (
        BasicTransformerBlock,
        TimestepEmbedding,
        PixArtAlphaTextProjection,
    )
    outer = ("pos_embed.proj", "proj_out")

    def blocks(self, model: Foreign) -> list[str]:
        """As for DiT, without the embeddings of the image size, which are not trained.

        The model calls them with the sizes of all samples in one column. A resolution takes two
        rows per sample, so rows and samples do not match.
        """
        return [
            name
            for name in super().blocks(model)
            if not name.endswith(("resolution_embedder", "aspect_ratio_embedder"))
        ]

    def modulations(self, model: Foreign) -> list[Modulation]:
        """None: one linear layer modulates the norms of all blocks."""
        return []

    def random_inputs(self, model: Foreign, batch: int) -> Inputs:
        """Noise and a timestep for each sample, a prompt embedding, and the image size."""
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
