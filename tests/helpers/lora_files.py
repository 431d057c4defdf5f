"""Random LoRAs for the layers of a model, under the names that several trainers give them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

RANK = 3
ALPHA = 6.0


def matrices(model: nn.Module, layers: Iterable[str], size: float = 0.5) -> dict[str, Tensor]:
    """`layer.lora_A.weight` and `layer.lora_B.weight` for float layers of `model`, rank 3."""
    tensors = {}
    for number, name in enumerate(layers):
        weight = model.get_submodule(name).weight
        generator = torch.Generator().manual_seed(number)
        out, inner = weight.shape[0], weight.shape[1:]
        A = torch.randn(RANK, *inner, generator=generator) / inner.numel() ** 0.5
        B = torch.randn(out, RANK, *(1,) * (weight.dim() - 2), generator=generator)
        tensors[f"{name}.lora_A.weight"] = A
        tensors[f"{name}.lora_B.weight"] = size * B / RANK**0.5
    return tensors


def of(component: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{component}.{key}": tensor for key, tensor in tensors.items()}


def kohya(tensors: dict[str, Tensor], prefix: str, alpha: Tensor | None) -> dict[str, Tensor]:
    """As kohya's trainer: underscores, down and up, and an alpha for each layer."""
    renamed = {}
    for key, tensor in tensors.items():
        layer, _, which = key.removesuffix(".weight").partition(".lora_")
        base = prefix + layer.replace(".", "_")
        renamed[f"{base}.lora_{ {'A': 'down', 'B': 'up'}[which] }.weight"] = tensor
        if alpha is not None:
            renamed[f"{base}.alpha"] = alpha
    return renamed


def processors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As diffusers' attention processors had them: `attn1.processor.to_q_lora.down.weight`."""
    renamed = {}
    for key, tensor in tensors.items():
        layer, _, which = key.removesuffix(".weight").partition(".lora_")
        attention, _, part = layer.removesuffix(".0").rpartition(".")
        way = {"A": "down", "B": "up"}[which]
        renamed[f"{attention}.processor.{part}_lora.{way}.weight"] = tensor
    return renamed


@torch.no_grad()
def merge(model: nn.Module, tensors: dict[str, Tensor], scale: float) -> nn.Module:
    """Add `scale * B A` to the weights of a float model: the oracle."""
    for key, A in tensors.items():
        layer, _, which = key.partition(".lora_")
        if which.startswith("A"):
            B = tensors[f"{layer}.lora_B.weight"]
            product = B.flatten(1).double() @ A.flatten(1).double()
            weight = model.get_submodule(layer).weight
            weight += (scale * product).view_as(weight).to(weight.dtype)
    return model
