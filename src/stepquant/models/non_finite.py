"""NaN and infinity, which codes cannot hold: they are let through as NaN.

Rounding turns NaN into some code and clips infinity, so a packed model would draw finite pictures
where the float model gives NaN. In a float denoiser, NaN spreads over the sample; here the whole
prediction of the sample is NaN.

Code that turns floats into codes reports the samples that are not finite, and hooks of the denoiser
collect these reports.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stepquant.models.calling import argument_names, prediction_in, tensors_in, with_prediction
from stepquant.quantizers.call_state import PerThread
from stepquant.support.errors import StepQuantError

# The reports of a call, bool tensors `[B]`, true for samples that are not finite; None outside.
_REPORTS = PerThread()


class NonFiniteError(StepQuantError):
    """Floats that become codes are not finite, and no denoiser's call collects reports."""


def report(x: Tensor) -> None:
    """Report the samples of `x`, float `[B, ...]`, that are not finite. Reads no number.

    Outside a denoiser's call, it does nothing.
    """
    reports = _REPORTS.state.value
    if reports is not None:
        reports.append(_bad_samples(x))


def report_found(x: Tensor) -> None:
    """Report the samples of `x`, float `[B, ...]`, in which a kernel saw NaN or infinity.

    The kernel may have been wrong: it also looks at sums and squares, which overflow earlier.

    Raises:
        NonFiniteError: a sample is not finite, and no call of a denoiser collects reports. The
            graph of a compiled denoiser collects none.
    """
    if not bool(_bad_samples(x).any()):
        return
    if _REPORTS.state.value is None:
        raise NonFiniteError(
            f"floats of shape {list(x.shape)}, which were to become codes, hold NaN or infinity: "
            "expected finite numbers; a packed denoiser that is not compiled predicts NaN instead"
        )
    report(x)


def _bad_samples(x: Tensor) -> Tensor:
    """Which samples of `x` are not finite: bool `[B]`, or `[]` for a number."""
    good = torch.isfinite(x)
    return ~good.flatten(1).all(dim=1) if x.dim() > 1 else ~good


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


class NonFiniteSamples:
    """Hooks of a packed denoiser: samples that are not finite somewhere predict NaN.

    They look at the arguments of the call, some small tensors, and at what is reported during it.
    Masks may hold infinity and are left out. Between calls, nothing is kept.

    While the graph of a compiled denoiser runs, nothing is reported. It computes with finite
    arguments, so that no kernel raises NonFiniteError for those.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._names = argument_names(denoiser)

    @staticmethod
    def attach(denoiser: nn.Module) -> None:
        """Let non-finite inputs of `denoiser` through from now on."""
        if not any(_is_ours(hook) for hook in denoiser._forward_hooks.values()):
            # Bound methods: a deep copy of the denoiser has its own.
            hook = NonFiniteSamples(denoiser)
            denoiser.register_forward_pre_hook(hook.begin, with_kwargs=True)
            denoiser.register_forward_hook(hook.end, with_kwargs=True, always_call=True)

    @staticmethod
    def detach(denoiser: nn.Module) -> None:
        """Take the hooks off."""
        for key, hook in list(denoiser._forward_hooks.items()):
            if _is_ours(hook):
                del denoiser._forward_hooks[key]
                denoiser._forward_hooks_with_kwargs.pop(key, None)
                denoiser._forward_hooks_always_called.pop(key, None)
        for key, hook in list(denoiser._forward_pre_hooks.items()):
            if _is_ours(hook):
                del denoiser._forward_pre_hooks[key]
                denoiser._forward_pre_hooks_with_kwargs.pop(key, None)

    def begin(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Report the arguments that are not finite; in a graph, give finite ones in their place."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        looked_at = {name: value for name, value in given.items() if "mask" not in name}
        state = _REPORTS.state
        state.begin()
        state.value = [
            _bad_samples(tensor) for tensor in tensors_in(looked_at) if _has_floats(tensor)
        ]
        if not torch.compiler.is_compiling():
            return None
        finite = tree_map_only(Tensor, _made_finite, looked_at)
        given = {**given, **finite}
        count = min(len(args), len(self._names))
        named = [given.pop(name) for name in self._names[:count]]
        return (*named, *args[count:]), given

    def end(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The `output` with NaN for the samples that were reported during the call."""
        state = _REPORTS.state
        reports = state.end()
        if state.value is reports:  # the outermost call has ended
            state.value = None
        if not reports or output is None:  # it had no `begin`, or failed
            return output
        try:
            prediction = prediction_in(output, denoiser)
        except StepQuantError:  # of a denoiser that nothing else here could call either
            return output
        bad = torch.zeros(len(prediction), dtype=torch.bool, device=prediction.device)
        for found in reports:
            # Blocks may fold frames or tokens into the batch, those of a sample side by side. All
            # samples share a value without a batch, or with one that is no multiple.
            folded = found.dim() == 1 and len(found) and len(found) % len(bad) == 0
            found = found.view(len(bad), -1).any(dim=1) if folded else found.any()
            bad = bad | found.to(prediction.device)
        return with_prediction(output, _filled(prediction, bad))


def _has_floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0


def _made_finite(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(0.0, 0.0, 0.0) if _has_floats(tensor) else tensor


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), NonFiniteSamples)
