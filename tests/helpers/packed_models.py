"""Small packed denoisers and pipelines for the checkpoint's tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepquant.calibration.ranges import search_weight_range
from stepquant.checkpoint.config import StepQuantConfig
from stepquant.checkpoint.save import attach_config
from stepquant.models.attention_processor import ProductsProcessor
from stepquant.models.input_bypass import InputBypass
from stepquant.models.surgery import replace_modules
from stepquant.quantizers import (
    QuantAttention,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    StepContext,
    StepGrid,
)
from stepquant.quantizers.weight import minmax_weight_range
from stepquant.simulation.packing import pack_model

STEPS = 5
WEIGHTS = "diffusion_pytorch_model.safetensors"
SPLIT = "up_blocks.0.resnets.0.conv1"  # its input is a concatenation with a skip
SCALED = "mid_block.attentions.0.to_q"
STATIC = "conv_in"
ATTENTION = (
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
)  # and not that of the encoder
STATIC_ATTENTION = ATTENTION[1]
MIXED = "down_blocks.0.resnets.0.conv2"  # out-channels of three bit widths


def unet(**changes: Any) -> UNet2DModel:
    """A float UNet of two levels with random weights."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (16, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**{**settings, **changes}).eval()


def packed_unet(
    weight_bits: int = 4,
    steps: int = STEPS,
    attention: bool = False,
    step_bias: bool = False,
    bypass: bool = False,
    **changes: Any,
) -> UNet2DModel:
    """`unet` with every conv and linear packed, one split, one with scaled input, one static.

    `attention`: with its products packed as well, except for one module's, and one static.
    `step_bias`: with one in the output layer. `bypass`: with what `conv_in` loses passed by.
    """
    model = unet(**changes)
    context = StepContext(StepGrid(torch.linspace(0, 900, steps).round()))
    context.attach(model)

    def simulate(name: str, module: nn.Module) -> QuantLayer | None:
        kind = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d}.get(type(module))
        if kind is None:
            return None
        outer = name in ("conv_in", "conv_out")
        half = (module.weight.shape[1] // 2,) * 2
        layer = kind(
            module, 8 if outer else weight_bits, 8, context, half if name == SPLIT else None
        )
        if name == SCALED:
            layer.multiply_channel_scale(torch.linspace(0.5, 2.0, layer.in_channels))
        if name == MIXED:
            shift = torch.arange(layer.out_channels) % 3 - 1
            layer.set_channel_bits((weight_bits + shift).clamp(1, 8))
        for quantizer, weight in zip(layer.weight_quantizers, layer.weight_parts(), strict=True):
            quantizer.fit(weight, search_weight_range if name == MIXED else minmax_weight_range)
        for quantizer in layer.activation_quantizers:
            quantizer.scale.data.fill_(8 / 255)
            quantizer.zero_point.data.fill_(128)
            if name != STATIC:
                quantizer.resize(steps)
                quantizer.scale.data.mul_(torch.linspace(0.7, 1.0, steps))
        if step_bias and name == "conv_out":
            layer.set_step_bias(torch.linspace(-1, 1, steps).view(-1, 1))
        return layer

    replace_modules(model, simulate)
    for index, name in enumerate(ATTENTION if attention else ()):
        rows = 1 if name == STATIC_ATTENTION else steps
        products = QuantAttention(8 - index, 3 + index, context)
        products.resize(rows)
        for quantizer in products.activation_quantizers:
            quantizer.scale.data.copy_(6 / 2**quantizer.bits * torch.linspace(0.7, 1.0, rows))
            quantizer.zero_point.data.fill_(2 ** (quantizer.bits - 1))
        products.probabilities.log2[::2] = True
        scales = torch.where(products.probabilities.log2, 0.9, 0.9 / 2 ** (3 + index))
        products.probabilities.scale.data.copy_(scales)
        products.quantizing = True
        model.get_submodule(name).set_processor(ProductsProcessor(products))
    if bypass:
        InputBypass(STATIC).attach(model, torch.linspace(1, 20, steps))
    return pack_model(model)


def packed_pipeline(**changes: Any) -> DDPMPipeline:
    """A pipeline that can be saved."""
    model = packed_unet(**changes)
    scheme = {"weight_bits": 4, "activation_bits": 8, "protocol": "strict"}
    attach_config(model, StepQuantConfig(scheme=scheme, provenance={"seed": 0}))
    return DDPMPipeline(model, DDIMScheduler())


@torch.no_grad()
def outputs(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What `model` gives at one step, and for a batch of samples at different steps."""
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [model(x, 450).sample, model(x, torch.tensor([0, 900, 300])).sample]


def tampered(
    source: Path, target: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]
) -> Path:
    """A copy of the model folder `source` after `change(tensors, quantization_config)`."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    tensors = load_file(target / WEIGHTS)
    change(tensors, config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return target
