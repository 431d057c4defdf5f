"""diffusers' `UNet2DModel` (DDPM, Ho et al. 2020; ADM-like unconditional UNets)."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from stepquant.models.adapter import register_adapter
from stepquant.models.base import DiffusersAdapter, Folds, Foreign, value_folds
from stepquant.models.inputs import MIDDLE, Inputs, random_sample

UNITS = (ResnetBlock2D, Attention, Downsample2D, Upsample2D, TimestepEmbedding)


@register_adapter
class UNet2DAdapter(DiffusersAdapter):
    """Adapter for `UNet2DModel`.

    Blocks are resnets, attentions, resamplers and the time embedding.
    """

    architecture = "UNet2DModel"
    units = UNITS
    outer = ("conv_in", "conv_out")

    def time_embedding_layers(self, model: Foreign) -> set[str]:
        """Both linear layers of the time embedding."""
        return {"time_embedding.linear_1", "time_embedding.linear_2"}

    def shortcut_and_downsampling_layers(self, model: Foreign) -> set[str]:
        """`conv_shortcut` of resnets, and the convs of downsamplers."""
        return {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d)
            and (name.endswith(".conv_shortcut") or ".downsamplers." in name)
        }

    def skip_splits(self, model: Foreign) -> dict[str, tuple[int, ...]]:
        """First conv and shortcut of each decoder resnet: backbone channels, then skip channels."""
        splits: dict[str, tuple[int, ...]] = {}
        backbone = model.config.block_out_channels[-1]
        for b, block in enumerate(model.up_blocks):
            for r, resnet in enumerate(block.resnets):
                parts = (backbone, resnet.in_channels - backbone)
                prefix = f"up_blocks.{b}.resnets.{r}"
                splits[f"{prefix}.conv1"] = parts
                if resnet.conv_shortcut is not None:
                    splits[f"{prefix}.conv_shortcut"] = parts
                backbone = resnet.out_channels
        return splits

    def folds(self, model: Foreign) -> Folds:
        """GroupNorm without SiLU into q, k and v; v into the output projection, linear in v."""
        sites = self.attention_sites(model)
        folds: Folds = []
        for name in sites:
            if model.get_submodule(name).group_norm is not None:
                projections = tuple(f"{name}.{part}" for part in ("to_q", "to_k", "to_v"))
                folds.append((f"{name}.group_norm", projections))
        return folds + value_folds(model, sites)

    def relation_site(self, model: Foreign) -> str:
        """The last decoder stage."""
        return f"up_blocks.{len(model.up_blocks) - 1}"

    def random_inputs(self, model: Foreign, batch: int) -> Inputs:
        """A sample at one timestep for the batch; class labels where it has any."""
        classes = model.config.num_class_embeds
        conditions = {} if classes is None else {"class_labels": torch.arange(batch) % classes}
        return random_sample(model, batch), torch.tensor(MIDDLE), conditions
