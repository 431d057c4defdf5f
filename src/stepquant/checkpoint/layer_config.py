"""Checkpoint config of one packed layer, and construction of the layer from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from stepquant.models.eligibility import why_float
from stepquant.numerics import check_bits
from stepquant.quantizers import StepContext
from stepquant.runtime.layers.integer import IntegerConv2d, IntegerLayer, IntegerLinear
from stepquant.runtime.ops.layer_spec import MOST_BITS_WITH_HALVES, LayerSpec
from stepquant.support.errors import StepQuantError

KINDS = {"linear": nn.Linear, "conv2d": nn.Conv2d}


@dataclass(frozen=True)
class LayerConfig:
    """Config of one packed layer; channels, kernel size and stride come from the float model.

    - `kind`: "linear" or "conv2d".
    - `weight_bits`: bits of the weights; the largest number if out-channels differ in bits.
    - `activation_bits`: bits of the input.
    - `steps`: rows of the step tables; 1 for a static layer.
    - `splits`: in-channels of each input part; None for one part.
    - `channel_scale`: whether the layer divides its input by a scale per in-channel.
    - `channel_counts`: `(bits, out-channels)` pairs, fewest bits first, if out-channels differ in
      bits; None otherwise.
    - `half_zero_points`: whether weight zero points count half steps.
    - `step_bias`: whether the layer adds another bias at each step.
    """

    kind: str
    weight_bits: int
    activation_bits: int
    steps: int = 1
    splits: tuple[int, ...] | None = None
    channel_scale: bool = False
    channel_counts: tuple[tuple[int, int], ...] | None = None
    half_zero_points: bool = False
    step_bias: bool = False

    @classmethod
    def from_dict(cls, name: str, values: dict[str, Any]) -> LayerConfig:
        """Read the config of layer `name` from its JSON object.

        Raises:
            StepQuantError: a value is unknown, missing, of the wrong type or out of range.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        missing = sorted({"kind", "weight_bits", "activation_bits"} - set(values))
        if unknown or missing:
            what = f"the unknown key '{unknown[0]}'" if unknown else f"no key '{missing[0]}'"
            raise StepQuantError(
                f"layer '{name}' of the quantization config has {what}: expected {', '.join(known)}"
            )
        if values["kind"] not in KINDS:
            raise _bad_value(name, "kind", values["kind"], f"one of {', '.join(KINDS)}")
        for key in ("weight_bits", "activation_bits"):
            check_bits(values[key], f"{key} of layer '{name}' in the quantization config")
        steps = values.get("steps", 1)
        if not _is_count(steps):
            raise _bad_value(name, "steps", steps, "a whole number of at least 1")
        for key in ("channel_scale", "half_zero_points", "step_bias"):
            if not isinstance(values.get(key, False), bool):
                raise _bad_value(name, key, values[key], "true or false")
        if values.get("half_zero_points") and values["weight_bits"] > MOST_BITS_WITH_HALVES:
            expected = f"false for more than {MOST_BITS_WITH_HALVES} weight bits"
            raise _bad_value(name, "half_zero_points", True, expected)
        counts = _channel_counts(name, values.get("channel_counts"), values["weight_bits"])
        splits = values.get("splits")
        if splits is not None:
            if not isinstance(splits, (list, tuple)) or not all(map(_is_count, splits)):
                raise _bad_value(name, "splits", splits, "a list of channel counts, or null")
            splits = tuple(splits)
        return cls(**{**values, "splits": splits, "channel_counts": counts})

    @classmethod
    def of(cls, layer: IntegerLayer) -> LayerConfig:
        """Return the config of the packed `layer`."""
        return cls(
            kind=layer.spec.kind,
            weight_bits=layer.spec.weight_bits,
            activation_bits=layer.spec.activation_bits,
            steps=layer.steps,
            splits=layer.splits if len(layer.splits) > 1 else None,
            channel_scale=layer.act_channel_scale is not None,
            channel_counts=layer.spec.channel_counts,
            half_zero_points=layer.spec.half_zero_points,
            step_bias=layer.step_bias is not None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a JSON object.

        `step_bias` is newer than the format, so it is left out if false.
        """
        counts = None if self.channel_counts is None else [list(c) for c in self.channel_counts]
        splits = None if self.splits is None else list(self.splits)
        values = {**asdict(self), "splits": splits, "channel_counts": counts}
        if not self.step_bias:
            del values["step_bias"]
        return values

    def packed_in_place_of(
        self, name: str, module: nn.Module, context: StepContext
    ) -> IntegerLayer:
        """Return a packed layer without data (on the meta device) to replace the float `module`.

        `name` names the layer in errors. `context` is the model's step context.

        Raises:
            StepQuantError: `module` is of another kind, is one that stays float, or has other
                channel counts than the config.
        """
        if not isinstance(module, KINDS[self.kind]):
            raise StepQuantError(
                f"layer '{name}' is a {type(module).__name__} in the model: expected "
                f"nn.{KINDS[self.kind].__name__}, as the quantization config says"
            )
        reason = why_float(module, subclasses=True)
        if reason is not None:
            raise StepQuantError(
                f"layer '{name}' in the model is one that stays float ({reason}): expected a "
                "linear layer, or a conv with one group and zero padding given in pixels"
            )
        spec = self._spec(module)
        splits = self.splits or (spec.in_channels,)
        if sum(splits) != spec.in_channels:
            raise StepQuantError(
                f"splits {splits} of layer '{name}' add up to {sum(splits)} channels: expected "
                f"{spec.in_channels}, the in-channels of the model's layer"
            )
        counted = sum(channels for _, channels in self.channel_counts or ())
        if self.channel_counts is not None and counted != spec.out_channels:
            raise StepQuantError(
                f"channel_counts of layer '{name}' add up to {counted} channels: expected "
                f"{spec.out_channels}, the out-channels of the model's layer"
            )
        has_bias = module.bias is not None
        kind = IntegerLinear if self.kind == "linear" else IntegerConv2d
        with torch.device("meta"):
            return kind(
                spec, splits, self.steps, context, has_bias, self.channel_scale, self.step_bias
            )

    def _spec(self, module: Any) -> LayerSpec:
        spec = self._shape(module)
        return replace(
            spec, channel_counts=self.channel_counts, half_zero_points=self.half_zero_points
        )

    def _shape(self, module: Any) -> LayerSpec:
        if isinstance(module, nn.Linear):
            return LayerSpec(
                "linear",
                module.in_features,
                module.out_features,
                self.weight_bits,
                self.activation_bits,
            )
        return LayerSpec(
            "conv2d",
            module.in_channels,
            module.out_channels,
            self.weight_bits,
            self.activation_bits,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _channel_counts(name: str, counts: Any, weight_bits: int) -> tuple[tuple[int, int], ...] | None:
    """Return `counts` as tuples; the bits must ascend and end with `weight_bits`."""
    if counts is None:
        return None
    pairs = isinstance(counts, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_count, pair))
        for pair in counts
    )
    bits = [pair[0] for pair in counts] if pairs else []
    if len(bits) < 2 or bits != sorted(set(bits)) or bits[-1] != weight_bits:
        expected = (
            "a list of at least two [bits, out-channels], bits ascending to weight_bits "
            f"({weight_bits}), or null"
        )
        raise _bad_value(name, "channel_counts", counts, expected)
    return tuple((pair[0], pair[1]) for pair in counts)


def _bad_value(name: str, key: str, value: Any, expected: str) -> StepQuantError:
    return StepQuantError(
        f"{key} of layer '{name}' in the quantization config is {value!r}: expected {expected}"
    )
