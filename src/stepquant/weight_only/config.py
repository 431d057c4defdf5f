"""Configs for quantization without calibration: weight-only, and W8A8 with dynamic scales."""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum
from typing import Any, ClassVar

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from stepquant.models.eligibility import why_float
from stepquant.runtime.layers.dynamic import DynamicConv2d, DynamicLinear
from stepquant.runtime.layers.weight_only import (
    WEIGHT_ONLY,
    Kinds,
    check_weight_only_bits,
)
from stepquant.support.errors import StepQuantError

FORMAT_VERSION = 1


class WeightOnlyMethod(str, Enum):
    """Values of `quant_method` in configs; an enum because diffusers reads `quant_method.value`."""

    WEIGHT_ONLY = "stepquant_weight_only"
    DYNAMIC = "stepquant_dynamic"


class WeightOnlyConfig(QuantizationConfigMixin):
    """`quantization_config` of a model with 8-bit or 4-bit weights, dequantized on use.

    Args:
        layers: names of the quantized layers. None, for a float model that is quantized while
            diffusers loads it, selects all linear and conv layers with a weight of their own.
        format_version: version of the checkpoint format.
        bits: bits of the weights, 8 or 4.
        grids: search for the grids of 4-bit weights, "minmax" or "mse"; None for 8 bits. Loading a
            quantized model does not depend on it.

    Raises:
        StepQuantError: an unknown key, another format version, or a value of the wrong type.
    """

    method: ClassVar[WeightOnlyMethod] = WeightOnlyMethod.WEIGHT_ONLY
    kinds: ClassVar[Kinds] = WEIGHT_ONLY
    any_conv: ClassVar[bool] = True  # including convs with groups and any padding mode

    def __init__(
        self,
        layers: list[str] | None = None,
        format_version: int = FORMAT_VERSION,
        bits: int = 8,
        grids: str | None = None,
        **more: Any,
    ) -> None:
        self.quant_method: Any = self.method
        if format_version != FORMAT_VERSION:
            raise StepQuantError(
                f"a weight-only component has format version {format_version!r}: expected "
                f"{FORMAT_VERSION}, the only one that this stepquant reads; upgrade stepquant"
            )
        unknown = set(more) - {"quant_method"}
        if unknown:
            raise StepQuantError(
                f"the config of a weight-only component has the unknown key '{min(unknown)}': "
                "expected format_version, layers, bits and grids"
            )
        named = isinstance(layers, list) and all(isinstance(name, str) for name in layers)
        if layers is not None and not named:
            raise StepQuantError(
                f"layers of the config of a weight-only component is {layers!r}: expected a list "
                "of names"
            )
        self.format_version = format_version
        self.layers = None if layers is None else sorted(layers)
        self.bits = check_weight_only_bits(bits, "bits of the config of a weight-only component")
        self.grids = grids

    @classmethod
    def takes(cls, module: nn.Module, shared: Collection[int] = ()) -> bool:
        """Whether a layer of `kinds` can replace `module`; for `shared` see `why_float`."""
        return why_float(module, any_conv=cls.any_conv, shared=shared) is None

    @property
    def names(self) -> list[str]:
        """Return `layers` of a quantized model.

        Raises:
            StepQuantError: the config names no layers, as only that of a float model may.
        """
        if self.layers is None:
            raise StepQuantError(
                "the config of a weight-only component names no layers: expected a list of the "
                "quantized layers; the folder is damaged"
            )
        return self.layers

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the config that `to_dict` wrote; see `WeightOnlyConfig` for its errors."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON values in a fixed order.

        `bits` and `grids` are left out at 8 bits, because the first files of this format had
        neither.
        """
        few_bits = {"bits": self.bits, "grids": self.grids} if self.bits < 8 else {}
        return {
            **few_bits,
            "format_version": self.format_version,
            "layers": self.layers,
            "quant_method": self.quant_method.value,
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return `to_dict` as indented JSON."""
        del use_diff
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        count = "all" if self.layers is None else len(self.layers)
        return f"{type(self).__name__}(layers={count}, bits={self.bits})"


class DynamicConfig(WeightOnlyConfig):
    """`quantization_config` for W8A8 on integer kernels, with activation scales from each call.

    Arguments and errors are those of `WeightOnlyConfig`, except that `bits` must be 8. Convs with
    groups or a padding mode other than zeros stay float.
    """

    method: ClassVar[WeightOnlyMethod] = WeightOnlyMethod.DYNAMIC
    kinds: ClassVar[Kinds] = (DynamicLinear, DynamicConv2d)
    any_conv: ClassVar[bool] = False

    def __init__(
        self, layers: list[str] | None = None, format_version: int = FORMAT_VERSION, **more: Any
    ) -> None:
        super().__init__(layers, format_version, **more)
        if self.bits != 8:
            raise StepQuantError(
                f"bits of a {type(self).__name__} is {self.bits}: expected 8, the bits of its "
                "integer kernels; use WeightOnlyConfig for 4"
            )
