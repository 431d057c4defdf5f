"""diffusers' `FluxTransformer2DModel`: FLUX.1 (Black Forest Labs, 2024)."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)

from stepquant.models.adapter import register_adapter
from stepquant.models.base import DiffusersAdapter, Folds, Foreign, projections
from stepquant.models.inputs import TOKENS, Inputs, noise
from stepquant.models.modulation import Modulation, norm_modulations

SIDE = 32  # tokens per side of a 512-pixel image; the config names no size


@register_adapter
class FluxAdapter(DiffusersAdapter):
    """Adapter for FLUX.1; each double or single block is a unit. Timesteps run from 0 to 1.

    The products of attention stay float, because FLUX has an attention class of its own.
    """

    architecture = "FluxTransformer2DModel"
    units = (
        FluxTransformerBlock,
        FluxSingleTransformerBlock,
        TimestepEmbedding,
        PixArtAlphaTextProjection,
    )
    outer = ("x_embedder", "proj_out")

    def skip_splits(self, model: Foreign) -> dict[str, tuple[int, ...]]:
        """Output layer of each single block: attention channels, then MLP channels."""
        return {
            f"single_transformer_blocks.{b}.proj_out": (
                block.proj_out.in_features - block.mlp_hidden_dim,
                block.mlp_hidden_dim,
            )
            for b, block in enumerate(model.single_transformer_blocks)
        }

    def folds(self, model: Foreign) -> Folds:
        """None: the values of text and image feed both output projections."""
        return []

    def modulations(self, model: Foreign) -> list[Modulation]:
        """The norms of each block, for image and text.

        The final norm is left out, because it lies between two units.
        """
        found: list[Modulation] = []
        for b in range(len(model.transformer_blocks)):
            name = f"transformer_blocks.{b}"
            for text, norm, ff in ((False, "norm1", "ff"), (True, "norm1_context", "ff_context")):
                found += norm_modulations(
                    model,
                    f"{name}.{norm}",
                    projections(f"{name}.attn", added=text),
                    (f"{name}.{ff}.net.0.proj",),
                )
        for b in range(len(model.single_transformer_blocks)):
            name = f"single_transformer_blocks.{b}"
            both = (*projections(f"{name}.attn"), f"{name}.proj_mlp")
            found += norm_modulations(model, f"{name}.norm", both)
        return found

    def attention_sites(self, model: Foreign) -> list[str]:
        """Every `FluxAttention`."""
        return [name for name, module in model.named_modules() if isinstance(module, FluxAttention)]

    def relation_site(self, model: Foreign) -> str:
        """The last block, which outputs image tokens."""
        if len(model.single_transformer_blocks) == 0:
            return f"transformer_blocks.{len(model.transformer_blocks) - 1}"
        return f"single_transformer_blocks.{len(model.single_transformer_blocks) - 1}"

    def random_inputs(self, model: Foreign, batch: int) -> Inputs:
        """Tokens of a 512-pixel image and a timestep for each sample, and two prompt embeddings.

        A model with guidance embeddings also gets a guidance of 3.5.
        """
        config = model.config
        rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).float()
        conditions = {
            "encoder_hidden_states": noise(batch, TOKENS, config.joint_attention_dim),
            "pooled_projections": noise(batch, config.pooled_projection_dim),
            "img_ids": places.flatten(0, 1),
            "txt_ids": torch.zeros(TOKENS, 3),
        }
        if config.guidance_embeds:
            conditions["guidance"] = torch.full((batch,), 3.5)
        sample = noise(batch, SIDE * SIDE, config.in_channels)
        return sample, torch.full((batch,), 0.5), conditions
