"""diffusers' `SD3Transformer2DModel`: Stable Diffusion 3 and 3.5 (Esser et al. 2024)."""

from __future__ import annotations

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding

from stepquant.models.adapter import register_adapter
from stepquant.models.base import DiffusersAdapter, Folds, Foreign, projections, value_folds
from stepquant.models.inputs import MIDDLE, TOKENS, Inputs, noise, random_sample
from stepquant.models.modulation import Modulation, norm_modulations


@register_adapter
class SD3Adapter(DiffusersAdapter):
    """Adapter for SD3; each joint block of text and image tokens is a unit.

    The products of joint attention stay float, because its processor is not a plain one.
    """

    architecture = "SD3Transformer2DModel"
    units = (JointTransformerBlock, TimestepEmbedding, PixArtAlphaTextProjection)
    outer = ("pos_embed.proj", "proj_out")

    def folds(self, model: Foreign) -> Folds:
        """Values into the output projection, in the image's own attention of version 3.5 only.

        In joint attention, the values of text and image feed both output projections.
        """
        return value_folds(model, self.attention_sites(model))

    def modulations(self, model: Foreign) -> list[Modulation]:
        """The norms of each block, for image and text.

        The final norm is left out, because it lies between two units. The second attention of
        version 3.5 reads the same norm under its own modulation.
        """
        found: list[Modulation] = []
        for b, block in enumerate(model.transformer_blocks):
            name = f"transformer_blocks.{b}"
            found += norm_modulations(
                model, f"{name}.norm1", projections(f"{name}.attn"), (f"{name}.ff.net.0.proj",)
            )
            if block.use_dual_attention:
                own = projections(f"{name}.attn2")
                found.append(Modulation(f"{name}.norm1.linear", 6, 7, own))
            found += norm_modulations(
                model,
                f"{name}.norm1_context",
                projections(f"{name}.attn", added=True),
                (f"{name}.ff_context.net.0.proj",),
            )
        return found

    def relation_site(self, model: Foreign) -> str:
        """The last joint block, which outputs image tokens."""
        return f"transformer_blocks.{len(model.transformer_blocks) - 1}"

    def random_inputs(self, model: Foreign, batch: int) -> Inputs:
        """Noise and a timestep for each sample, and two prompt embeddings."""
        conditions = {
            "encoder_hidden_states": noise(batch, TOKENS, model.config.joint_attention_dim),
            "pooled_projections": noise(batch, model.config.pooled_projection_dim),
        }
        return random_sample(model, batch), torch.full((batch,), float(MIDDLE)), conditions
