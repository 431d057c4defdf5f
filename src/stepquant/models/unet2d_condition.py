"""diffusers' `UNet2DConditionModel`: Stable Diffusion 1.x, 2.x and XL (Rombach et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D

from stepquant.models.adapter import register_adapter
from stepquant.models.base import Folds, Foreign, feed_forward_folds, value_folds
from stepquant.models.inputs import MIDDLE, TOKENS, Inputs, noise, random_sample
from stepquant.models.unet2d import UNet2DAdapter
from stepquant.support.errors import StepQuantError

TIME_IDS = 6  # SDXL: original size, crop, target size; two numbers each


@register_adapter
class UNet2DConditionAdapter(UNet2DAdapter):
    """Adapter for `UNet2DConditionModel`.

    Resnets and resamplers are blocks as in `UNet2DModel`, and so is each transformer block.
    """

    architecture = "UNet2DConditionModel"
    units = (ResnetBlock2D, BasicTransformerBlock, Downsample2D, Upsample2D, TimestepEmbedding)

    def time_embedding_layers(self, model: Foreign) -> set[str]:
        """The linear layers of the time embedding, and of SDXL's embedding of text and sizes."""
        return super(UNet2DAdapter, self).time_embedding_layers(model)

    def folds(self, model: Foreign) -> Folds:
        """Norms into the layers they feed, v into the output projection, and GEGLU's linear half.

        Keys and values of cross-attention read the prompt embedding. No layer of the model produces
        it, so the activation quantizer applies their scaling.
        """
        folds: Folds = []
        for name, module in model.named_modules():
            if isinstance(module, Transformer2DModel) and module.is_input_continuous:
                folds.append((f"{name}.norm", (f"{name}.proj_in",)))
            if isinstance(module, BasicTransformerBlock):
                folds += _norm_folds(name, module)
        return folds + value_folds(model, self.attention_sites(model)) + feed_forward_folds(model)

    def random_inputs(self, model: Foreign, batch: int) -> Inputs:
        """Noise for each sample, one timestep, a prompt embedding, and SDXL's additions.

        Raises:
            StepQuantError: the config has an embedding other than those of Stable Diffusion 1, 2 or
                XL.
        """
        config = model.config
        width = config.encoder_hid_dim or config.cross_attention_dim
        width = width if isinstance(width, int) else width[0]
        conditions: dict[str, Any] = {"encoder_hidden_states": noise(batch, TOKENS, width)}
        if config.addition_embed_type == "text_time":
            ids = TIME_IDS * config.addition_time_embed_dim
            conditions["added_cond_kwargs"] = {
                "text_embeds": noise(batch, config.projection_class_embeddings_input_dim - ids),
                "time_ids": torch.full((batch, TIME_IDS), 512.0),
            }
        elif config.addition_embed_type is not None or config.class_embed_type is not None:
            found = config.addition_embed_type or config.class_embed_type
            raise StepQuantError(
                f"UNet2DConditionModel has embeddings of the kind '{found}': expected those of "
                "Stable Diffusion 1, 2 or XL, for which random inputs are known"
            )
        if config.num_class_embeds is not None:
            conditions["class_labels"] = torch.arange(batch) % config.num_class_embeds
        if config.time_cond_proj_dim is not None:
            conditions["timestep_cond"] = noise(batch, config.time_cond_proj_dim)
        return random_sample(model, batch), torch.tensor(MIDDLE), conditions


def _norm_folds(name: str, block: BasicTransformerBlock) -> Folds:
    """Return the folds of those layer norms of a block that feed only projections."""
    if block.norm_type != "layer_norm" or block.pos_embed is not None:
        return []
    folds: Folds = []
    if not block.only_cross_attention:
        projections = tuple(f"{name}.attn1.{part}" for part in ("to_q", "to_k", "to_v"))
        folds.append((f"{name}.norm1", projections))
    if block.attn2 is not None and block.attn2.is_cross_attention:
        folds.append((f"{name}.norm2", (f"{name}.attn2.to_q",)))
    if block.norm3 is not None:
        folds.append((f"{name}.norm3", (f"{name}.ff.net.0.proj",)))
    return [fold for fold in folds if getattr(block, fold[0].split(".")[-1]).elementwise_affine]
