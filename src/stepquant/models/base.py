"""Common parts of the adapters for diffusers' architectures."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn

from stepquant.models.modulation import Modulation
from stepquant.models.surgery import outermost_modules

Folds = list[tuple[str, tuple[str, ...]]]

Foreign = Any  # a module of diffusers, whose attributes mypy does not know


class DiffusersAdapter:
    """Base class that answers from the classes of submodules.

    - `architecture`: name of the denoiser's class.
    - `units`: classes whose modules are blocks.
    - `outer`: names of the input layer and the output layer.
    """

    architecture: ClassVar[str]
    units: ClassVar[tuple[type[nn.Module], ...]]
    outer: ClassVar[tuple[str, str]]  # input and output layer

    def blocks(self, model: nn.Module) -> list[str]:
        """Modules of the classes `units`; a conv or linear layer outside them is its own block."""
        return outermost_modules(model, (*self.units, nn.Conv2d, nn.Linear))

    def input_output_layers(self, model: nn.Module) -> set[str]:
        """The two layers in `outer`."""
        return set(self.outer)

    def time_embedding_layers(self, model: nn.Module) -> set[str]:
        """The linears of every `TimestepEmbedding`."""
        return {
            f"{name}.{child}"
            for name, module in model.named_modules()
            if isinstance(module, TimestepEmbedding)
            for child, layer in module.named_children()
            if isinstance(layer, nn.Linear)
        }

    def shortcut_and_downsampling_layers(self, model: nn.Module) -> set[str]:
        """None: transformers have no convs on the residual stream."""
        return set()

    def skip_splits(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """None: no layer has concatenated inputs."""
        return {}

    def float_layers(self, model: nn.Module) -> dict[str, str]:
        """None beyond the layers that have no quantized class."""
        return {}

    def modulations(self, model: nn.Module) -> list[Modulation]:
        """None: no norm is modulated by a linear layer of its own."""
        return []

    def attention_sites(self, model: nn.Module) -> list[str]:
        """Every `Attention`."""
        return [name for name, module in model.named_modules() if isinstance(module, Attention)]


def projections(attention: str, added: bool = False) -> tuple[str, ...]:
    """Names of an attention's q, k and v; with `added`, those of the text in joint attention."""
    kinds = "add_{}_proj" if added else "to_{}"
    return tuple(f"{attention}.{kinds.format(letter)}" for letter in "qkv")


def value_folds(model: nn.Module, sites: list[str]) -> Folds:
    """Folds of the values (v) into the output projection, which is linear in them.

    Joint attention is left out: there, the values of two streams feed the same projections.
    """
    folds: Folds = []
    for name in sites:
        attention = model.get_submodule(name)
        joined = getattr(attention, "added_kv_proj_dim", None) is not None
        # Elsewhere a norm of the value heads, a gate or a second projection may be in between.
        if isinstance(attention, Attention) and not joined and not attention.pre_only:
            folds.append((f"{name}.to_v", (f"{name}.to_out.0",)))
    return folds


def feed_forward_folds(model: nn.Module) -> Folds:
    """Folds of a GEGLU's linear half into the output projection.

    Feed-forward layers with another activation are left out.
    """
    folds: Folds = []
    for name, module in model.named_modules():
        if isinstance(module, FeedForward) and type(module.net[0]).__name__ == "GEGLU":
            folds.append((f"{name}.net.0.proj", (f"{name}.net.2",)))
    return folds
