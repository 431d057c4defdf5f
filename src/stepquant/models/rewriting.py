"""Which layers are rewritten for the integer kernels, and where in a model.

Integer kernels compute two-dimensional convolutions of one group with zero padding. Other
convolutions are rewritten as such (`models.rewritten_conv`): with the same products and sums, so
that quantization finds an `nn.Conv2d` like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, cast

from torch import nn

from stepquant.models.eligibility import kept_by_class, matches, shared_weights
from stepquant.models.rewritten_conv import (
    CONVS,
    TRANSPOSED,
    RewrittenConv,
    RewrittenConvTranspose,
)
from stepquant.models.surgery import copy_around, replace_modules
from stepquant.support.errors import StepQuantError

# Integer products work on 64 in-channels at once, and fewer are filled up with zeros: groups of 32
# channels are slower than float ones (benchmarks/rewritten_convs.py).
FEWEST_CHANNELS = 64


def class_for(layer: nn.Module, shared: Collection[int] = ()) -> type[RewrittenConv] | None:
    """The class that rewrites `layer`, or None where that is not needed or not possible.

    | Layer | Rewritten if |
    |---|---|
    | `nn.Conv1d`, `nn.Conv3d` | with any padding |
    | `nn.Conv2d` | it has groups, padding other than zeros, or padding given as a text |
    | `nn.ConvTranspose1d`, `nn.ConvTranspose2d` | see below |

    A transposed convolution must have dilation 1, a kernel whose size is a multiple of the stride,
    and no more output padding than padding. With another kernel, taps of zero would be computed,
    and float is faster; with more output padding, no input reaches the last values.

    With groups, each needs at least `FEWEST_CHANNELS` in-channels. Layers with hooks, or with a
    `forward` of their own, are left as they are. `shared`: see
    `eligibility.shared_weights`; such a layer would take the weight from another module.
    """
    kind = type(layer)
    if kind not in (*CONVS, *TRANSPOSED) or id(layer._parameters.get("weight")) in shared:
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return None  # the new layer would lose what they do
    conv = cast(Any, layer)
    if conv.groups > 1 and conv.in_channels // conv.groups < FEWEST_CHANNELS:
        return None
    if kind in TRANSPOSED:
        fits = all(
            dilation == 1 and kernel % stride == 0 and more <= padding
            for kernel, stride, padding, more, dilation in zip(
                *(conv.kernel_size, conv.stride, conv.padding, conv.output_padding, conv.dilation),
                strict=True,
            )
        )
        return RewrittenConvTranspose if fits else None
    zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return None if kind is nn.Conv2d and conv.groups == 1 and zeros else RewrittenConv


def with_rewritten(model: nn.Module, kept: Iterable[str] = ()) -> nn.Module:
    """A copy of `model` that shares its tensors, with layers rewritten; `model` if none is.

    `kept`: patterns of modules that stay as they are, as in `eligibility.matches`.
    """
    patterns = [*kept, *kept_by_class(model)]
    shared = shared_weights(model)
    found = {
        name: kind
        for name, module in model.named_modules()
        if (kind := class_for(module, shared)) is not None
        and not any(matches(name, pattern) for pattern in patterns)
    }
    if not found:
        return model
    return rewrite(copy_around(model, [model]), found)


def rewrite(model: nn.Module, names: Collection[str]) -> nn.Module:
    """`model`, changed in place, with the layers of these `names` rewritten.

    Raises:
        StepQuantError: `model` has no such layer, or it cannot be rewritten.
    """
    modules = dict(model.named_modules())
    for name in sorted(names):
        if name not in modules or class_for(modules[name]) is None:
            found = type(modules[name]).__name__ if name in modules else "none"
            raise StepQuantError(
                f"the quantization config rewrites the layer '{name}', which is {found} in "
                f"{type(model).__name__}: expected a convolution that can be rewritten; the config "
                "belongs to another model"
            )

    def replacement(name: str, module: nn.Module) -> nn.Module | None:
        kind = class_for(module) if name in names else None
        return None if kind is None else kind(module)

    return replace_modules(model, replacement)


def names_of_rewritten(model: nn.Module) -> list[str]:
    """The names of the rewritten layers, sorted."""
    return sorted(n for n, module in model.named_modules() if isinstance(module, RewrittenConv))


def name_before(model: nn.Module, name: str) -> str:
    """The name that the layer `name` of `model` had before it was rewritten, or `name`."""
    owner = name.rpartition(".convs.")[0]
    inside = owner and isinstance(model.get_submodule(owner), RewrittenConv)
    return owner if inside else name


def without_rewritten(model: nn.Module) -> nn.Module:
    """`model`, changed in place, with the layers that rewritten ones stand for."""
    return replace_modules(
        model, lambda _, module: module.original() if isinstance(module, RewrittenConv) else None
    )
