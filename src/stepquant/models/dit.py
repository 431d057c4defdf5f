"""diffusers' `DiTTransformer2DModel`: class-conditional DiT (Peebles and Xie, ICCV 2023)."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from stepquant.models.adapter import register_adapter
from stepquant.models.base import DiffusersAdapter, Folds, Foreign, projections, value_folds
from stepquant.models.inputs import MIDDLE, Inputs, random_sample
from stepquant.models.modulation import Modulation, norm_modulations


@register_adapter
class DiTAdapter(DiffusersAdapter):
    """Adapter for DiT; each transformer block is a unit, with its own time and class embedding.

    The output layers reuse the embedding of the first block.
    """

    architecture = "DiTTransformer2DModel"
    units: ClassVar[tuple[type[nn.Module], ...]] = (BasicTransformerBlock,)
    outer = ("pos_embed.proj", "proj_out_2")

    def folds(self, model: Foreign) -> Folds:
        """Values into the output projection.

        Nothing folds through GELU. The activation quantizer behind it applies the scaling.
        """
        return value_folds(model, self.attention_sites(model))

    def modulations(self, model: Foreign) -> list[Modulation]:
        """Both norms of each block.

        The final norm is left out, because it lies between two units.
        """
        found: list[Modulation] = []
        for b in range(len(model.transformer_blocks)):
            block = f"transformer_blocks.{b}"
            found += norm_modulations(
                model, f"{block}.norm1", projections(f"{block}.attn1"), (f"{block}.ff.net.0.proj",)
            )
        return found

    def relation_site(self, model: Foreign) -> str:
        """The last transformer block, which outputs tokens."""
        return f"transformer_blocks.{len(model.transformer_blocks) - 1}"

    def random_inputs(self, model: Foreign, batch: int) -> Inputs:
        """Noise, a timestep and a class label for each sample."""
        labels = torch.arange(batch) % model.config.num_embeds_ada_norm
        return random_sample(model, batch), torch.full((batch,), MIDDLE), {"class_labels": labels}
