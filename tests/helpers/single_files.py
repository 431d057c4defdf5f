"""A Stable Diffusion pipeline as one file, with the names of the code that it came from."""

from __future__ import annotations

from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

# Whole names first, then what is inside of resnets; `to` the original ones.
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def save_as_one_file(pipeline: StableDiffusionPipeline, file: Path) -> Path:
    """UNet, VAE and CLIP text encoder of `pipeline` in the layout of CompVis' checkpoints."""
    layers = pipeline.unet.config.layers_per_block
    attends = [bool(getattr(block, "attentions", None)) for block in pipeline.unet.up_blocks]
    tensors = {
        f"model.diffusion_model.{unet_name(name, layers, attends)}": value
        for name, value in pipeline.unet.state_dict().items()
    }
    blocks = len(pipeline.vae.config.block_out_channels)
    for name, value in pipeline.vae.state_dict().items():
        original, convolution = vae_name(name, blocks)
        is_matrix = convolution and value.dim() == 2
        tensors[f"first_stage_model.{original}"] = value[:, :, None, None] if is_matrix else value
    for name, value in pipeline.text_encoder.state_dict().items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        tensors[f"cond_stage_model.transformer.{name}"] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    return file


def unet_name(name: str, layers: int, attends: list[bool]) -> str:
    """The original name of a tensor of `UNet2DConditionModel` with `layers` in each block."""
    for ours, theirs in UNET.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    where, *rest = name.split(".")
    if where == "mid_block":
        kind, number, *rest = rest
        place = 2 * int(number) + (kind == "attentions")
        return f"middle_block.{place}.{inside(kind, rest)}"
    block, kind, number, *rest = rest
    row = (layers + 1) * int(block) + int(number)
    if where == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (int(block) + 1)}.0.op.{rest[-1]}"
        return f"input_blocks.{row + 1}.{int(kind == 'attentions')}.{inside(kind, rest)}"
    if kind == "upsamplers":
        place = 1 + attends[int(block)]
        return f"output_blocks.{(layers + 1) * int(block) + layers}.{place}.conv.{rest[-1]}"
    return f"output_blocks.{row}.{int(kind == 'attentions')}.{inside(kind, rest)}"


def inside(kind: str, rest: list[str]) -> str:
    """The rest of a name within a resnet or an attention."""
    return ".".join([RESNET.get(rest[0], rest[0]) if kind == "resnets" else rest[0], *rest[1:]])


def vae_name(name: str, blocks: int) -> tuple[str, bool]:
    """The original name of a tensor of `AutoencoderKL`, and whether it is of a 1x1 conv there."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("mid_block.resnets.0", "mid.block_1")
    name = name.replace("mid_block.resnets.1", "mid.block_2")
    if "mid_block.attentions.0." in name:
        half, _, rest = name.partition(".mid_block.attentions.0.")
        part, _, which = rest.rpartition(".")
        return f"{half}.mid.attn_1.{VAE_ATTENTION[part]}.{which}", part != "group_norm"
    for ours, theirs in (("down_blocks", "down"), ("up_blocks", "up")):
        half, found, rest = name.partition(f".{ours}.")
        if found:
            block, kind, number, *rest = rest.split(".")
            place = int(block) if theirs == "down" else blocks - 1 - int(block)
            inner = f"block.{number}" if kind == "resnets" else f"{theirs}sample"
            return f"{half}.{theirs}.{place}.{inner}.{'.'.join(rest)}", False
    return name, False


def state_dicts(pipeline: StableDiffusionPipeline) -> dict[str, dict[str, Tensor]]:
    """All tensors of the three, by component."""
    return {name: getattr(pipeline, name).state_dict() for name in ("unet", "vae", "text_encoder")}
