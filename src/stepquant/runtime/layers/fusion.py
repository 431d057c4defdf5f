"""Refusing to fuse the projections of quantized attention."""

from __future__ import annotations

from functools import partial
from typing import Any

from stepquant.runtime.layers.dtype_marker import MarksDtype
from stepquant.support.errors import StepQuantError


def refuse_fusion(model: Any) -> None:
    """Make `model.fuse_qkv_projections()` refuse quantized layers.

    diffusers would concatenate their codes, or ask them for a weight that they do not have.
    """
    if hasattr(type(model), "fuse_qkv_projections"):
        # Not a bound method, which pickle would look up by its name on the model.
        model.fuse_qkv_projections = partial(_fuse_qkv_projections, model)


def _fuse_qkv_projections(model: Any) -> None:
    """As the class's method.

    Raises:
        StepQuantError: the model has quantized layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, MarksDtype):
            raise StepQuantError(
                f"fuse_qkv_projections was called on a {type(model).__name__} with the quantized "
                f"layer '{name}': expected a float model, because quantized projections have codes "
                "of their own; load the float model"
            )
    type(model).fuse_qkv_projections(model)
