"""What the methods need to know of an architecture, and where that knowledge is looked up."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import nn

from stepquant.models.inputs import Inputs
from stepquant.models.modulation import Modulation
from stepquant.support.errors import StepQuantError
from stepquant.support.registry import Registry


class DenoiserAdapter(Protocol):
    """One architecture; all answers are names of submodules."""

    architecture: str

    def blocks(self, model: nn.Module) -> list[str]:
        """Units that are distilled one after another; together they hold every layer."""
        ...

    def input_output_layers(self, model: nn.Module) -> set[str]:
        """The layers that see the sample or give the result."""
        ...

    def time_embedding_layers(self, model: nn.Module) -> set[str]:
        """The layers that embed the timestep, before it is projected for each block."""
        ...

    def shortcut_and_downsampling_layers(self, model: nn.Module) -> set[str]:
        """Convs on the residual stream: shortcuts of resnets, and downsampling."""
        ...

    def skip_splits(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Layers with concatenated inputs: the in-channels of each part."""
        ...

    def float_layers(self, model: nn.Module) -> dict[str, str]:
        """Layers that must stay float, each with the reason."""
        ...

    def folds(self, model: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
        """`(producer, consumers)` pairs for which an equivalent scaling folds exactly.

        The producer's output channel `k` is divided by `s[k]`, through its weight and bias, and
        every consumer's weight is multiplied with `s[k]` along in-channel `k`. A producer with more
        output channels than the consumers have in-channels is divided in its first ones: the linear
        half of a GEGLU. Producer and consumers lie in one of `blocks`, which is trained to give
        what the float one gives: a division that another block takes back would be undone.
        """
        ...

    def modulations(self, model: nn.Module) -> list[Modulation]:
        """Modulated norms, into whose linear layer an equivalent scaling folds exactly.

        The linear layer lies in one block with its consumers, as in `folds`.
        """
        ...

    def relation_site(self, model: nn.Module) -> str:
        """The module that gives the last features before the output layers.

        `[B, C, H, W]`, or a transformer's tokens `[B, P, C]`; of a tuple the last.
        """
        ...

    def attention_sites(self, model: nn.Module) -> list[str]:
        """Attention modules, whose products stay float in the runtime."""
        ...

    def random_inputs(self, model: nn.Module, batch: int) -> Inputs:
        """Random arguments of the config's sizes, the same at each call, in the middle of time."""
        ...


ADAPTERS: Registry[DenoiserAdapter] = Registry("adapter", "stepquant.adapters", "stepquant.models")

AnyAdapter = TypeVar("AnyAdapter", bound=type[DenoiserAdapter])


def register_adapter(adapter: AnyAdapter) -> AnyAdapter:
    """Decorator: take an adapter for all denoisers whose class is named by its `architecture`.

    The class is called without arguments, once.

    Raises:
        StepQuantError: it names no architecture, or one that has an adapter.
    """
    architecture = getattr(adapter, "architecture", None)
    if not isinstance(architecture, str):
        raise StepQuantError(
            f"the architecture of the adapter {adapter.__qualname__} is {architecture!r}: expected "
            "the name of the denoiser's class"
        )
    ADAPTERS.register(architecture, adapter(), adapter)
    return adapter


def adapter_for(model: nn.Module) -> DenoiserAdapter:
    """The adapter of `model`'s class, or of one that it derives from."""
    for kind in type(model).__mro__:  # a subclass is taken for what it derives from
        if kind.__name__ in ADAPTERS:
            return ADAPTERS[kind.__name__]
    raise StepQuantError(
        f"no adapter for the architecture {type(model).__name__}: expected one of "
        f"{', '.join(ADAPTERS)}; for any other, quantize(pipeline, "
        "adapter=general_adapter(pipeline)), or DenoiserPipeline around a module of your own "
        "(docs/python.md has the ten lines)"
    )
