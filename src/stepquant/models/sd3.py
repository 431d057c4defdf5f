"""diffusers' `SD3Transformer2DModel`: Stable Diffusion 3 and 3.5 (Esser et al. 2024)."""

from __future__ import annotations

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding
from torch import nn

from stepquant.models.base import DiffusersAdapter, Folds, value_folds
from stepquant.models.inputs import MIDDLE, TOKENS, Inputs, noise, random_sample


class SD3Adapter(DiffusersAdapter):
    """Each joint block of text and image tokens is a unit.

    The products of joint attention stay float: its processor is not the plain one.
    """

    architecture = "SD3Transformer2DModel"
    units = (JointTransformerBlock, TimestepEmbedding, PixArtAlphaTextProjection)
    outer = ("pos_embed.proj", "proj_out")

    def folds(self, model: nn.Module) -> Folds:
        """V into the output projection, in the image's own attention of 3.5 only.

        In joint attention the values of text and image feed both output projections.
        """
        return value_folds(model, self.attention_sites(model))

    def relation_site(self, model: nn.Module) -> str:
        """The last joint block: image tokens."""
        return f"transformer_blocks.{len(model.transformer_blocks) - 1}"

    def random_inputs(self, model: nn.Module, batch: int) -> Inputs:
        """A sample with a timestep for each image, and a prompt's two embeddings."""
        conditions = {
            "encoder_hidden_states": noise(batch, TOKENS, model.config.joint_attention_dim),
            "pooled_projections": noise(batch, model.config.pooled_projection_dim),
        }
        return random_sample(model, batch), torch.full((batch,), float(MIDDLE)), conditions
