"""What most architectures of diffusers have in common, for adapters to build on."""

from __future__ import annotations

from typing import ClassVar

from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn

from stepquant.models.modulation import Modulation
from stepquant.models.surgery import outermost_modules

Folds = list[tuple[str, tuple[str, ...]]]


class DiffusersAdapter:
    """Answers from the classes of submodules. `units`: the classes whose modules are blocks."""

    architecture: ClassVar[str]
    units: ClassVar[tuple[type[nn.Module], ...]]
    outer: ClassVar[tuple[str, str]]  # input and output layer

    def blocks(self, model: nn.Module) -> list[str]:
        """Modules of the classes `units`; any other layer is its own unit."""
        return outermost_modules(model, (*self.units, nn.Conv2d, nn.Linear))

    def input_output_layers(self, model: nn.Module) -> set[str]:
        """The two layers `outer`."""
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
        """None: no concatenated inputs."""
        return {}

    def float_layers(self, model: nn.Module) -> dict[str, str]:
        """None beyond those that no layer class takes."""
        return {}

    def modulations(self, model: nn.Module) -> list[Modulation]:
        """None: no norm is modulated by a linear layer of its own."""
        return []

    def attention_sites(self, model: nn.Module) -> list[str]:
        """Every `Attention`."""
        return [name for name, module in model.named_modules() if isinstance(module, Attention)]


def projections(attention: str, added: bool = False) -> tuple[str, ...]:
    """q, k and v of an attention; of the text in joint attention with `added`."""
    kinds = "add_{}_proj" if added else "to_{}"
    return tuple(f"{attention}.{kinds.format(letter)}" for letter in "qkv")


def value_folds(model: nn.Module, sites: list[str]) -> Folds:
    """Values into the output projection, which is linear in v; not where several v's are joined."""
    folds: Folds = []
    for name in sites:
        attention = model.get_submodule(name)
        joined = getattr(attention, "added_kv_proj_dim", None) is not None
        # A norm of the values' heads, a gate or a second projection would stand in between.
        if isinstance(attention, Attention) and not joined and not attention.pre_only:
            folds.append((f"{name}.to_v", (f"{name}.to_out.0",)))
    return folds


def feed_forward_folds(model: nn.Module) -> Folds:
    """The linear half of a GEGLU into the projection out; other activations are not linear."""
    folds: Folds = []
    for name, module in model.named_modules():
        if isinstance(module, FeedForward) and type(module.net[0]).__name__ == "GEGLU":
            folds.append((f"{name}.net.0.proj", (f"{name}.net.2",)))
    return folds
