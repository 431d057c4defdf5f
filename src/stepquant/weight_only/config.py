"""Configs for quantization without calibration: weight-only, and W8A8 with dynamic scales."""

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
    """Values of `quant_method` in configs; an enum because diffusers reads `quant_method.value`."""

    WEIGHT_ONLY = "stepquant_weight_only"
    DYNAMIC = "stepquant_dynamic"


class WeightOnlyConfig(QuantizationConfigMixin):
    """`quantization_config` of a model with 8-bit or 4-bit weights, dequantized on use.

    Once a float model is loaded, its config names the packed layers, and the attribute
    `float_layers`, which is not saved, says why each other linear, conv or embedding layer stays
    float.

    Args:
        layers: names of the quantized layers. None, for a float model that is quantized while
            diffusers loads it, selects all linear and conv layers with a weight of their own.
        format_version: version of the checkpoint format.
        bits: bits of the weights, 8 or 4.
        grids: search for the grids of 4-bit weights, "minmax" or "mse"; None for 8 bits. Loading a
            quantized model does not depend on it.
        modules_to_not_convert: names or patterns of modules whose layers stay float while a float
            model is loaded; see `models.eligibility.matches`.
        architecture: the values of the model's config that its results depend on, which a load
            compares with those of the model; None for a float model, and in older folders.
        sha256: digest of the codes and scales of a model of transformers; models of diffusers
            have a tensor for it.

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
        modules_to_not_convert: list[str] | None = None,
        architecture: dict[str, Any] | None = None,
        sha256: str | None = None,
        **more: Any,
    ) -> None:
        self.quant_method: Any = self.method
        if format_version != FORMAT_VERSION or isinstance(format_version, bool):
            raise StepQuantError(
                f"a weight-only component has format version {format_version!r}: expected "
                f"{FORMAT_VERSION}, the only one that this stepquant reads; upgrade stepquant"
            )
        unknown = set(more) - {"quant_method"}
        if unknown:
            raise StepQuantError(
                f"the config of a weight-only component has the unknown key '{min(unknown)}': "
                "expected format_version, layers, bits, grids, modules_to_not_convert, "
                "architecture and sha256"
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
        if architecture is not None and not isinstance(architecture, dict):
            raise StepQuantError(
                f"architecture of the config of a weight-only component is {architecture!r}: "
                "expected an object with named values"
            )
        self.architecture = architecture
        self.sha256 = sha256

    @classmethod
    def why_float(cls, module: nn.Module, shared: Collection[int] = ()) -> str | None:
        """Why no layer of `kinds` can replace `module`, or None; for `shared` see `why_float`."""
        return why_float(module, any_conv=cls.any_conv, shared=shared)

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether a layer of `kinds` can replace `module`."""
        return cls.why_float(module) is None

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
        neither, and so is an empty `modules_to_not_convert`.
        """
        few_bits = {"bits": self.bits, "grids": self.grids} if self.bits < 8 else {}
        patterns = self.modules_to_not_convert
        kept = {"modules_to_not_convert": patterns} if patterns else {}
        newer = {"architecture": self.architecture, "sha256": self.sha256}
        return {
            **few_bits,
            **kept,
            **{key: value for key, value in newer.items() if value is not None},
            "format_version": self.format_version,
            "layers": self.layers,
            "quant_method": self.quant_method.value,
        }

    def layers_json(self) -> str:
        """Return everything that results depend on as canonical JSON, for the checksum."""
        values = {
            "architecture": self.architecture,
            "bits": self.bits,
            "layers": self.layers,
            "quant_method": self.quant_method.value,
        }
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return `to_dict` as indented JSON."""
        del use_diff
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __str__(self) -> str:
        """As diffusers prints configs: the class and its JSON. `repr` is short."""
        return f"{type(self).__name__} {self.to_json_string()}"

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
