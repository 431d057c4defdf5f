"""From a float model to its trainable simulation."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

from stepquant.calibration.observe import quant_layers
from stepquant.models.adapter import DenoiserAdapter
from stepquant.models.attention_processor import ProductsProcessor, why_products_stay_float
from stepquant.models.mapped import Mapped, named_weights
from stepquant.models.surgery import copy_around, replace_modules
from stepquant.quantizers import QuantAttention, QuantConv2d, QuantLinear, StepContext
from stepquant.simulation.scheme import Scheme
from stepquant.support.errors import StepQuantError


def simulate(
    float_model: nn.Module,
    adapter: DenoiserAdapter,
    scheme: Scheme,
    context: StepContext,
    kept: Mapping[str, str] = MappingProxyType({}),
) -> tuple[nn.Module, dict[str, str]]:
    """A copy of `float_model` with simulated layers, not quantizing yet, and what stays float.

    `kept`: layers that stay float besides those of scheme and adapter, each with its reason.
    """
    check_finite_weights(float_model)
    bits, left_float = scheme.layer_bits(float_model, adapter)
    bits = {name: value for name, value in bits.items() if name not in kept}
    left_float = {**left_float, **kept}
    splits = adapter.skip_splits(float_model)
    replaced = [module for name, module in float_model.named_modules() if name in bits]
    model = copy_around(float_model, replaced)

    def build(name: str, module: nn.Module) -> nn.Module | None:
        if name not in bits:
            return module.loaded() if isinstance(module, Mapped) else None
        if isinstance(module, nn.Linear):
            return QuantLinear(module, *bits[name], context, splits.get(name))
        assert isinstance(module, nn.Conv2d)
        return QuantConv2d(module, *bits[name], context, splits.get(name))

    replace_modules(model, build)
    # Only the simulated layers are trained. (A norm whose weight needs a gradient where its input
    # does not is a crash of the process in torch 2.13, on inputs that are channels last.)
    trained = {
        parameter for layer in quant_layers(model).values() for parameter in layer.parameters()
    }
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
    model.float().eval()
    if scheme.attention_bits is not None:
        left = float_products(float_model, adapter)
        for name in adapter.attention_sites(float_model):
            if name in left:
                continue
            products = QuantAttention(scheme.attention_bits, scheme.probability_bits, context)
            model.get_submodule(name).set_processor(ProductsProcessor(products))  # type: ignore[operator]
    context.attach(model)
    return model, left_float


def float_products(model: nn.Module, adapter: DenoiserAdapter) -> dict[str, str]:
    """The attention modules of a float `model` whose products cannot be quantized, and why."""
    reasons = {
        name: why_products_stay_float(model.get_submodule(name))
        for name in adapter.attention_sites(model)
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def check_finite_weights(model: nn.Module) -> None:
    """An error that names the first parameter with a NaN or an infinity."""
    for name, value in named_weights(model):
        if not torch.isfinite(value).all():
            raise StepQuantError(
                f"parameter '{name}' holds NaN or infinity: expected finite weights; check the "
                "model's files"
            )
