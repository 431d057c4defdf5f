"""Layers that peft has wrapped to add adapters, recognized without importing peft."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from stepquant.support.errors import StepQuantError


def adapted_layer(module: nn.Module) -> nn.Module | None:
    """The layer that peft has wrapped in `module` to add adapters to it, or None.

    peft, which diffusers' LoRA calls use, puts a module of its own in a layer's place and holds the
    layer as `base_layer`.
    """
    found = module._modules.get("base_layer")
    return found if hasattr(module, "active_adapters") else None


def without_adapter(module: nn.Module) -> nn.Module:
    """`module`, or the layer that peft has wrapped in it."""
    return adapted_layer(module) or module


def adapters_text(names: list[str]) -> str:
    """The adapters of a layer for a sentence, such as "the adapter 'a'"."""
    quoted = ", ".join(f"'{name}'" for name in names)
    return f"the adapter{'s' * (len(names) > 1)} {quoted}" if names else "an empty adapter layer"


def check_no_adapter_tensors(names: Iterable[str]) -> None:
    """Check that the tensors to save, of these `names`, are those of a model without adapters.

    Raises:
        StepQuantError: peft has wrapped a layer, so that the names do not fit the model's class.
    """
    for name in names:
        layer, within, _ = name.rpartition(".base_layer.")
        if within:
            raise StepQuantError(
                f"peft has wrapped the layer '{layer}' for a LoRA, so a load would not find its "
                "tensors: expected a model without adapters; call unload_lora_weights of the "
                "pipeline first, and save_lora_weights to keep the LoRA"
            )


def named_adapters(model: nn.Module) -> list[tuple[str, list[str]]]:
    """`(layer's name, names of its adapters)` for each layer in `model` that peft has wrapped.

    A layer whose adapters were all deleted stays wrapped, with no names.
    """
    return [
        (name, sorted(getattr(module, "r", {})))
        for name, module in model.named_modules()
        if adapted_layer(module) is not None
    ]
