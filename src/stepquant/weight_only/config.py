"""Configs of models with weights of few bits that need no calibration."""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum
from typing import Any, ClassVar

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from stepquant.models.eligibility import check_patterns, why_float
from stepquant.runtime.layers.dynamic import DynamicConv2d, DynamicLinear
from stepquant.runtime.layers.weight_only import (
    WEIGHT_ONLY,
    Kinds,
    check_weight_only_bits,
)
from stepquant.support.errors import StepQuantError

FORMAT_VERSION = 1


class WeightOnlyMethod(str, Enum):
    """diffusers reads `quant_method.value`."""

    WEIGHT_ONLY = "stepquant_weight_only"
    DYNAMIC = "stepquant_dynamic"


class WeightOnlyConfig(QuantizationConfigMixin):
    """Weights of 8 or 4 bits, dequantized on use: the `quantization_config` of such a model.

    `layers`: names of the packed layers. None, for a float model that is quantized while it is
    loaded, stands for all linear and conv layers that do not share their weight. `bits`: of their
    weights, 8 or 4. `grids`: how the grids of 4 bits were found, "minmax" or "mse", None for 8
    bits; loading what has codes does not depend on it. `modules_to_not_convert`: names or patterns
    of modules whose layers stay float in a float model (`models.eligibility.matches`).

    Once a float model is loaded, its config names the packed layers, and `float_layers` says why
    each other linear, conv or embedding layer stays float. `float_layers` is not saved.

    Raises StepQuantError for unknown keys, a newer format version and values of the wrong type.
    """

    method: ClassVar[WeightOnlyMethod] = WeightOnlyMethod.WEIGHT_ONLY
    kinds: ClassVar[Kinds] = WEIGHT_ONLY
    any_conv: ClassVar[bool] = True  # with groups and any padding

    def __init__(
        self,
        layers: list[str] | None = None,
        format_version: int = FORMAT_VERSION,
        bits: int = 8,
        grids: str | None = None,
        modules_to_not_convert: list[str] | None = None,
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
                "expected format_version, layers, bits, grids and modules_to_not_convert"
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
        self.modules_to_not_convert = list(
            check_patterns(
                modules_to_not_convert or [],
                "modules_to_not_convert of the config of a weight-only component",
            )
        )
        self.float_layers: dict[str, str] = {}

    @classmethod
    def why_float(cls, module: nn.Module, shared: Collection[int] = ()) -> str | None:
        """Why no layer of these kinds can replace `module`, or None; `shared`: see `why_float`."""
        return why_float(module, any_conv=cls.any_conv, shared=shared)

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether a layer of these kinds can replace `module`."""
        return cls.why_float(module) is None

    @property
    def names(self) -> list[str]:
        """`layers` of a model that is quantized already, where they must be known."""
        if self.layers is None:
            raise StepQuantError(
                "the config of a weight-only component names no layers: expected a list of those "
                "with codes; the folder is damaged"
            )
        return self.layers

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The config that `to_dict` wrote."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """JSON values in a fixed order; those that are new in the format only where they matter."""
        few_bits = {"bits": self.bits, "grids": self.grids} if self.bits < 8 else {}
        patterns = self.modules_to_not_convert
        kept = {"modules_to_not_convert": patterns} if patterns else {}
        return {
            **few_bits,
            **kept,
            "format_version": self.format_version,
            "layers": self.layers,
            "quant_method": self.quant_method.value,
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_dict` as indented JSON."""
        del use_diff
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        count = "all" if self.layers is None else len(self.layers)
        return f"{type(self).__name__}(layers={count}, bits={self.bits})"


class DynamicConfig(WeightOnlyConfig):
    """8-bit weights and activations, on integer kernels; activation scales are found at each call.

    As `WeightOnlyConfig`; convs with groups or padding other than zeros stay float.
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
                "integer kernels; WeightOnlyConfig takes 4, too"
            )
