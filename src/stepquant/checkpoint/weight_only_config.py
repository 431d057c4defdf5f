"""`quantization_config` of a component whose weights are packed and dequantized on use."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from stepquant.errors import StepQuantError
from stepquant.runtime.weight_only import check_weight_only_bits

FORMAT_VERSION = 1


class WeightOnlyMethod(str, Enum):
    """diffusers reads `quant_method.value`."""

    WEIGHT_ONLY = "stepquant_weight_only"


class WeightOnlyConfig(QuantizationConfigMixin):
    """The `quantization_config` of such a component: the names of its packed layers.

    `bits`: of their weights, 8 or 4. `grids`: how the grids of 4 bits were found, "minmax" or
    "mse", None for 8 bits; loading does not depend on it.

    Raises StepQuantError for unknown keys, a newer format version and values of the wrong type.
    """

    def __init__(
        self,
        layers: list[str] | None = None,
        format_version: int = FORMAT_VERSION,
        bits: int = 8,
        grids: str | None = None,
        **more: Any,
    ) -> None:
        self.quant_method: Any = WeightOnlyMethod.WEIGHT_ONLY
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
        if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
            raise StepQuantError(
                f"layers of the config of a weight-only component is {layers!r}: expected a list "
                "of names"
            )
        self.format_version, self.layers = format_version, sorted(layers)
        self.bits = check_weight_only_bits(bits, "bits of the config of a weight-only component")
        self.grids = grids

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The config that `to_dict` wrote."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """JSON values in a fixed order; `bits` and `grids`, new in the format, below 8 bits."""
        few_bits = {"bits": self.bits, "grids": self.grids} if self.bits < 8 else {}
        return {
            **few_bits,
            "format_version": self.format_version,
            "layers": self.layers,
            "quant_method": self.quant_method.value,
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_dict` as indented JSON."""
        del use_diff
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"WeightOnlyConfig(layers={len(self.layers)}, bits={self.bits})"
