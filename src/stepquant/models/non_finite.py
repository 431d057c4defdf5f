"""NaN and infinity, which codes cannot hold: they are let through as NaN.

Rounding turns NaN into some code and clips infinity, so that a packed model would draw finite
pictures where the float model gives NaN. Whatever a sample touches is NaN in a float denoiser, and
here the whole prediction of that sample is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepquant.models.calling import argument_names, prediction_in, tensors_in, with_prediction
from stepquant.support.errors import StepQuantError


def let_through(y: Tensor, x: Tensor) -> Tensor:
    """`y`, a layer's result for `x`, with NaN for each sample whose `x` is not finite.

    Both have the samples in their first dimension. The extremes of a sample tell: NaN is the least
    and the greatest of its values. Python reads no number, so that the call can be captured.
    """
    if x.numel() == 0:
        return y
    dims = tuple(range(1, x.dim()))
    if dims:
        good = torch.isfinite(x.amin(dim=dims)) & torch.isfinite(x.amax(dim=dims))
    else:
        good = torch.isfinite(x).all()
    return _filled(y, ~good)


def _filled(y: Tensor, bad: Tensor) -> Tensor:
    """`y` with NaN for the samples `bad`, bool `[B]` or `[]`."""
    return y.masked_fill(bad.view(-1, *(1,) * (y.dim() - 1)), torch.nan)


class NonFiniteInputs:
    """Forward hook of a packed denoiser: samples whose inputs are not finite predict NaN.

    It looks at the arguments only, some small tensors, and keeps nothing between calls. Masks may
    hold infinity and are left out.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._names = argument_names(denoiser)

    @staticmethod
    def attach(denoiser: nn.Module) -> None:
        """Let non-finite inputs of `denoiser` through from now on."""
        if not any(_is_ours(hook) for hook in denoiser._forward_hooks.values()):
            # A bound method: a deep copy of the denoiser has its own.
            hook = NonFiniteInputs(denoiser)
            denoiser.register_forward_hook(hook.look, with_kwargs=True)

    @staticmethod
    def detach(denoiser: nn.Module) -> None:
        """Take the hook off."""
        for key, hook in list(denoiser._forward_hooks.items()):
            if _is_ours(hook):
                del denoiser._forward_hooks[key]
                denoiser._forward_hooks_with_kwargs.pop(key, None)

    def look(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The `output` with NaN where the arguments of the call are not finite."""
        try:
            prediction = prediction_in(output, denoiser)
        except StepQuantError:  # of a denoiser that nothing else here could call either
            return output
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        bad = torch.zeros(len(prediction), dtype=torch.bool, device=prediction.device)
        for name, value in given.items():
            if "mask" in name:
                continue
            for tensor in tensors_in(value):
                if tensor.is_floating_point() and tensor.numel():
                    bad = bad | self._bad(tensor, len(prediction)).to(prediction.device)
        return with_prediction(output, _filled(prediction, bad))

    @staticmethod
    def _bad(tensor: Tensor, batch: int) -> Tensor:
        """Which samples of `tensor` are not finite, bool `[batch]`, or `[]` where they share it."""
        good = torch.isfinite(tensor)
        if tensor.dim() == 0 or len(tensor) != batch:
            return ~good.all()
        return ~good.flatten(1).all(dim=1) if tensor.dim() > 1 else ~good


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), NonFiniteInputs)
