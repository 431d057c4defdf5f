"""Bit widths: `Scheme`, its named protocols, and the bits of each layer."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from torch import nn
from torch.nn.modules.conv import _ConvNd

from stepquant.models.adapter import DenoiserAdapter
from stepquant.models.eligibility import (
    check_patterns,
    modules_kept_float,
    unmatched,
    why_float,
)
from stepquant.models.rewriting import name_before
from stepquant.numerics import check_bits
from stepquant.support.errors import StepQuantError

PROTOCOLS = {
    "strict": (
        "every conv and linear quantized, input and output conv at 8 bits, per-out-channel "
        "weights, per-tensor activations, attention products at attention_bits or float"
    ),
    "paper:mpq-dm": (
        "as MPQ-DM's and EfficientDM's released code: shortcut and downsampling convs float, time "
        "embedding, input and output conv at 8 bits, attention products float"
    ),
}


class Override(BaseModel):
    """Other bits for layers whose name matches `pattern`.

    Attributes:
        pattern: Shell-style pattern, case-sensitive.
        weight_bits: 1 to 8.
        activation_bits: 1 to 8.

    Raises:
        StepQuantError: Bits are out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    pattern: str
    weight_bits: int
    activation_bits: int

    @field_validator("weight_bits", "activation_bits", mode="before")
    @classmethod
    def _bits(cls, value: int) -> int:
        return check_bits(value, "bits of an override")


PATTERNS = "modules_to_not_convert"
ALL_KEYS = {"all keys": True}  # context of `model_dump` that keeps empty patterns


def without_empty_patterns(plain: dict[str, Any], info: SerializationInfo) -> dict[str, Any]:
    """A dumped scheme without empty patterns, which checkpoints of before they existed lack."""
    if plain[PATTERNS] or info.context == ALL_KEYS:
        return plain
    return {key: value for key, value in plain.items() if key != PATTERNS}


class Scheme(BaseModel):
    """Bits of weights and activations, the protocol, and exceptions by layer name.

    All bits are whole numbers from 1 to 8.

    Attributes:
        weight_bits: Bits of weights, per out-channel grids.
        activation_bits: Bits of layer inputs, per-tensor grids.
        protocol: Name in `PROTOCOLS`: which layers stay float or at 8 bits.
        attention_bits: Bits of the queries, keys and values that attention multiplies; None leaves
            its products float.
        probability_bits: Bits of attention's probabilities.
        overrides: Other bits for layers by name.
        modules_to_not_convert: Names or shell-style patterns of modules whose layers stay float;
            see `models.eligibility.matches`.

    Raises:
        StepQuantError: Bits are out of range, the protocol is unknown or leaves attention's
            products float where `attention_bits` is set, or `probability_bits` is set without
            `attention_bits`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    weight_bits: int = 8
    activation_bits: int = 8
    protocol: str = "strict"
    attention_bits: int | None = None
    probability_bits: int = 8
    overrides: tuple[Override, ...] = ()
    modules_to_not_convert: tuple[str, ...] = ()

    @field_validator("modules_to_not_convert", mode="before")
    @classmethod
    def _patterns(cls, value: object) -> tuple[str, ...]:
        return check_patterns(value, "modules_to_not_convert of the scheme")

    @model_serializer(mode="wrap")
    def _plain(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        return without_empty_patterns(handler(self), info)

    @field_validator("weight_bits", "activation_bits", "probability_bits", mode="before")
    @classmethod
    def _bits(cls, value: int) -> int:
        return check_bits(value, "bits of the scheme")

    @field_validator("attention_bits", mode="before")
    @classmethod
    def _bits_or_float(cls, value: int | None) -> int | None:
        return None if value is None else check_bits(value, "attention bits of the scheme")

    @model_validator(mode="after")
    def _probabilities_with_attention(self) -> Scheme:
        if self.attention_bits is None and self.probability_bits != 8:
            raise StepQuantError(
                f"probability_bits of the scheme is {self.probability_bits}, but attention_bits "
                "leaves attention's products float: expected both; set attention_bits too"
            )
        return self

    @model_validator(mode="after")
    def _products_of_the_protocol(self) -> Scheme:
        if self.attention_bits is not None and self.protocol == "paper:mpq-dm":
            raise StepQuantError(
                f"attention_bits of the scheme is {self.attention_bits} under the protocol "
                f"{self.protocol}, which leaves attention's products float: expected none; leave "
                "attention_bits out or take the protocol strict"
            )
        return self

    @field_validator("protocol")
    @classmethod
    def _protocol(cls, value: str) -> str:
        if value not in PROTOCOLS:
            raise StepQuantError(
                f"unknown protocol '{value}': expected one of {', '.join(PROTOCOLS)}"
            )
        return value

    @property
    def label(self) -> str:
        """The usual short name, such as "w4a8"."""
        return f"w{self.weight_bits}a{self.activation_bits}"

    def layer_bits(
        self, model: nn.Module, adapter: DenoiserAdapter
    ) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
        """Bits of each layer of `model`, and the layers that stay float.

        A later override wins over an earlier one, and all of them over the protocol's 8 bits.

        Returns:
            `({layer: (weight bits, activation bits)}, {layer left float: reason})`.

        Raises:
            StepQuantError: An override matches no quantized layer, or an entry of
                `modules_to_not_convert` no module.
        """
        bits: dict[str, tuple[int, int]] = {}
        left_float: dict[str, str] = {}
        outer = adapter.input_output_layers(model)
        exempt: set[str] = set()
        asked = modules_kept_float(model, self.modules_to_not_convert)
        kept = {**adapter.float_layers(model), **asked}
        for pattern in unmatched(model, self.modules_to_not_convert):
            raise StepQuantError(
                f"modules_to_not_convert has '{pattern}', which names no module of "
                f"{type(model).__name__}: expected names or patterns of modules such as "
                f"'{next((name for name, _ in model.named_children()), 'conv_in')}'"
            )
        if self.protocol == "paper:mpq-dm":
            outer = outer | adapter.time_embedding_layers(model)
            exempt = adapter.shortcut_and_downsampling_layers(model)
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear | _ConvNd):
                continue
            reason = why_float(module, subclasses=True) or kept.get(name)
            if name in exempt:
                reason = f"protocol {self.protocol}"
            if reason:
                left_float[name] = reason
                continue
            bits[name] = (8, 8) if name in outer else (self.weight_bits, self.activation_bits)
            for override in self.overrides:
                if _matches(model, name, override.pattern):
                    bits[name] = (override.weight_bits, override.activation_bits)
        for override in self.overrides:
            if not any(_matches(model, name, override.pattern) for name in bits):
                raise StepQuantError(
                    f"override pattern '{override.pattern}' matches no layer: expected a pattern "
                    f"of layer names such as '{next(iter(bits), 'conv_in')}'"
                )
        return bits, left_float


def _matches(model: nn.Module, name: str, pattern: str) -> bool:
    """Whether `pattern` names the layer `name`, or the layer that it is rewritten from."""
    return fnmatchcase(name, pattern) or fnmatchcase(name_before(model, name), pattern)
