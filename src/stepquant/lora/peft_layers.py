"""peft's LoRA layers around quantized layers, for the LoRA calls of diffusers and peft themselves.

A layer computes `base_layer(x) + scaling * B(A(x))`. `A` and `B` are float32 parameters, whatever
the dtype of the model, as in stepquant's own branches (`runtime.layers.lora_branch`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.nn import functional as F

from stepquant.runtime.layers.integer import IntegerConv2d, IntegerLayer, IntegerLinear
from stepquant.runtime.layers.weight_only import WeightOnly
from stepquant.support.errors import StepQuantError

QUANTIZED = (IntegerLayer, WeightOnly)
FUSING = (
    "has quantized weights, and a LoRA cannot be fused into them without rounding them again: "
    "expected a LoRA that stays loaded, which gives the same images; to fuse it, call fuse_lora on "
    "the float pipeline, and quantize the result"
)


class _OnQuantizedLayer(lora.LoraLayer):
    """Overrides of peft's LoRA layers for a quantized base layer."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRAs; `peft_checks` refuses the others by name."""
        return {(): None}

    @property
    def weight(self) -> Tensor:
        """A tensor with the model's dtype and the layer's device, for callers that read these."""
        base: Any = self.get_base_layer()
        return base.dtype_marker

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        if isinstance(module, nn.Linear | IntegerLinear):
            return module.in_features, module.out_features
        return module.in_channels, module.out_channels

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        return base_layer.weight_scale.device, torch.float32

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, in the mode of the base layer: a new dropout must not run in sampling."""
        super().update_layer(*args, **kwargs)
        self.train(self.base_layer.training)  # type: ignore[attr-defined]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: raises StepQuantError, because quantized weights cannot take a LoRA in."""
        raise StepQuantError(f"a layer of the class {type(self.base_layer).__name__} {FUSING}")


class LoraOnLinear(_OnQuantizedLayer, lora.Linear):
    """peft's LoRA on a quantized linear layer."""


class LoraOnConv2d(_OnQuantizedLayer, lora.Conv2d):
    """peft's LoRA on a quantized conv: `A` has the conv's kernel and window, `B` is 1x1."""

    _described = False

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        """Wrap `base_layer` and add the adapter, as `peft.tuners.lora.layer.Conv2d`.

        Raises:
            StepQuantError: the conv has groups, and the rank `r` is no multiple of them.
        """
        nn.Module.__init__(self)
        lora.LoraLayer.__init__(self, base_layer)
        groups: Any = base_layer.groups
        if r % groups != 0:
            raise StepQuantError(
                f"the LoRA '{adapter_name}' has the rank {r} for a conv of {groups} groups: "
                "expected a multiple of the groups, or a LoRA without this layer"
            )
        self._active_adapter, self._kernel_dim, self.conv_fn = adapter_name, 4, F.conv2d
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter."""
        with self._float_base():
            super().update_layer(adapter_name, *args, **kwargs)
        # peft forgets it.
        self.lora_A[adapter_name].dilation = self.get_base_layer().dilation

    def get_base_layer(self) -> Any:
        """The quantized layer."""
        base: Any = super().get_base_layer()
        if not self._described:
            return base
        return nn.Conv2d(
            *(base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding),
            *(base.dilation, base.groups, base.bias is not None, base.padding_mode, "meta"),
        )

    @contextmanager
    def _float_base(self) -> Iterator[None]:
        """Describe the base layer as a float one: peft makes `A` and `B` of its class."""
        self._described = True
        try:
            yield
        finally:
            self._described = False

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        return super()._get_base_layer_device_and_dtype(self.base_layer)


def lora_on(layer: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """A LoRA layer of peft around the quantized `layer`; the arguments are those of peft's own."""
    convs = isinstance(layer, nn.Conv2d | IntegerConv2d)
    return (LoraOnConv2d if convs else LoraOnLinear)(layer, *args, **kwargs)
