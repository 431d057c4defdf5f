"""The adapter protocol, and the registry that maps a denoiser's class to its adapter."""

from __future__ import annotations

from typing import ClassVar, Protocol, TypeVar

from torch import nn

from stepquant.models.inputs import Inputs
from stepquant.models.modulation import Modulation
from stepquant.support.errors import StepQuantError
from stepquant.support.registry import Registry


class DenoiserAdapter(Protocol):
    """Protocol of an adapter, which describes one architecture to the methods.

    Modules and layers are given by their names in the model. `architecture` is the name of the
    denoiser's class.
    """

    architecture: ClassVar[str]

    def blocks(self, model: nn.Module) -> list[str]:
        """Names of the units that are distilled one after another.

        Steps that train block by block leave out the layers that lie in no block.
        """
        ...

    def input_output_layers(self, model: nn.Module) -> set[str]:
        """Names of the layers that read the sample or produce the prediction."""
        ...

    def time_embedding_layers(self, model: nn.Module) -> set[str]:
        """Names of the layers that embed the timestep, before its projection for each block."""
        ...

    def shortcut_and_downsampling_layers(self, model: nn.Module) -> set[str]:
        """Names of the convs on the residual stream: resnet shortcuts and downsampling."""
        ...

    def skip_splits(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """In-channels of each input part, for the layers with concatenated inputs."""
        ...

    def float_layers(self, model: nn.Module) -> dict[str, str]:
        """Layers that must stay float, and the reason for each."""
        ...

    def folds(self, model: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
        """`(producer, consumers)` pairs for which an equivalent scaling folds exactly.

        Folding divides the producer's output channel `k` by `s[k]`, through its weight and bias. It
        multiplies every consumer's weight by `s[k]` along in-channel `k`. If the producer has more
        output channels than the consumers have in-channels, folding divides the first ones: the
        linear half of a GEGLU.

        Producer and consumers must lie in the same block. Each block is trained to reproduce its
        float output, so training would undo a division that only another block compensates for.
        """
        ...

    def modulations(self, model: nn.Module) -> list[Modulation]:
        """Modulated norms whose linear layer absorbs an equivalent scaling exactly.

        The linear layer and its consumers must lie in the same block, as in `folds`.
        """
        ...

    def relation_site(self, model: nn.Module) -> str:
        """Name of the module that outputs the last features before the output layers.

        Its output is `[B, C, H, W]`, or a transformer's tokens `[B, P, C]`. If it returns a tuple,
        the last entry holds the features.
        """
        ...

    def attention_sites(self, model: nn.Module) -> list[str]:
        """Names of the attention modules.

        Their products stay float if the scheme has no `attention_bits`, or if
        `attention_processor.why_products_stay_float` names a reason.
        """
        ...

    def random_inputs(self, model: nn.Module, batch: int) -> Inputs:
        """Random arguments for `batch` samples, in the middle of the time range.

        Sizes come from the model's config. Every call returns the same values.
        """
        ...


ADAPTERS: Registry[DenoiserAdapter] = Registry("adapter", "stepquant.adapters", "stepquant.models")

AnyAdapter = TypeVar("AnyAdapter", bound=type[DenoiserAdapter])


def register_adapter(adapter: AnyAdapter) -> AnyAdapter:
    """Class decorator that registers an adapter for the denoiser class `architecture`.

    The decorator instantiates the adapter once, without arguments, and returns the class unchanged.

    Raises:
        StepQuantError: `architecture` is missing or not a string, or already has an adapter.
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
    """Return the adapter for the class of `model`, or for its nearest base class that has one.

    Raises:
        StepQuantError: neither the class nor any base class has an adapter.
    """
    for kind in type(model).__mro__:  # a subclass uses the adapter of its base class
        if kind.__name__ in ADAPTERS:
            return ADAPTERS[kind.__name__]
    raise StepQuantError(
        f"no adapter for the architecture {type(model).__name__}: expected one of "
        f"{', '.join(ADAPTERS)}; for any other, call quantize(pipeline, "
        "adapter=general_adapter(pipeline)), or wrap a module of your own in a DenoiserPipeline "
        "(docs/how-to/quantize-a-module.md)"
    )
