"""The `quantization_config` of a checkpoint: everything about it that is not a tensor."""

from __future__ import annotations

import json
from collections import Counter
from enum import Enum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from stepquant.checkpoint.attention_config import AttentionConfig
from stepquant.checkpoint.layer_config import LayerConfig
from stepquant.support.errors import StepQuantError

FORMAT_VERSION = 1


class StepQuantMethod(str, Enum):
    """Name of the quantization method; an enum, because diffusers reads `quant_method.value`."""

    STEPQUANT = "stepquant"


class StepQuantConfig(QuantizationConfigMixin):
    """The `quantization_config` of a stepquant checkpoint.

    - `layers`: for each packed layer, its `LayerConfig` or the same as a dict. `layer_default` adds
      the keys that a dict leaves out.
    - `attention`: for each attention with packed products, its `AttentionConfig` or the same as a
      dict.
    - `steps`: length of the step grid.
    - `input_error_bypass`: name of the layer that reads the sample, if a bypass adds its
      quantization error back to the prediction; None otherwise.
    - `float_layers`: for each layer left in float, the reason.
    - `architecture`: the values of the model's config that its results depend on, which a load
      compares with those of the model; None in checkpoints from before there was a copy.
    - `rewritten_layers`: names of the convolutions that `models.rewriting` replaces, in order.
    - `scheme`: the requested bits and protocol.
    - `recipe`: the resolved recipe.
    - `provenance`: seed, scheduler and versions.

    Loading does not depend on `float_layers`, `scheme`, `recipe` and `provenance`, which are kept
    unchanged. They hold JSON values, but none that differ between two runs of one command, such as
    times and paths: both runs must write the same bytes.

    Raises:
        StepQuantError: a key is unknown, the format version is newer than this stepquant, or a
            value has the wrong type.
    """

    def __init__(
        self,
        scheme: dict[str, Any] | None = None,
        layers: dict[str, LayerConfig | dict[str, Any]] | None = None,
        float_layers: dict[str, str] | None = None,
        recipe: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
        steps: int = 1,
        layer_default: dict[str, Any] | None = None,
        attention: dict[str, AttentionConfig | dict[str, Any]] | None = None,
        input_error_bypass: str | None = None,
        format_version: int = FORMAT_VERSION,
        architecture: dict[str, Any] | None = None,
        rewritten_layers: list[str] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method: Any = StepQuantMethod.STEPQUANT  # not a member of diffusers' enum
        # Checked first: a newer format may have keys that this version does not know.
        self.format_version = _check_version(format_version)
        if unknown:
            raise StepQuantError(
                f"the quantization config has the unknown key '{min(unknown)}': expected "
                "format_version, scheme, steps, layer_default, layers, attention, "
                "input_error_bypass, architecture, rewritten_layers, float_layers, recipe and "
                "provenance"
            )
        self.scheme = _json_object("scheme", scheme)
        self.float_layers = _json_object("float_layers", float_layers)
        self.recipe = _json_object("recipe", recipe)
        self.provenance = _json_object("provenance", provenance)
        self.architecture = (
            None if architecture is None else _json_object("architecture", architecture)
        )
        self.rewritten_layers = [] if rewritten_layers is None else rewritten_layers
        if not isinstance(self.rewritten_layers, list) or not all(
            isinstance(name, str) for name in self.rewritten_layers
        ):
            raise StepQuantError(
                f"rewritten_layers of the quantization config is {rewritten_layers!r}: expected a "
                "list of layer names"
            )
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise StepQuantError(
                f"steps of the quantization config is {steps!r}: expected the length of the step "
                "grid, a whole number of at least 1"
            )
        self.steps = steps
        self.layers = _resolve_layers(layers, layer_default, steps)
        self.attention = _resolve_attention(attention, steps)
        known = isinstance(input_error_bypass, str) and input_error_bypass in self.layers
        if input_error_bypass is not None and not known:
            raise StepQuantError(
                f"input_error_bypass of the quantization config is {input_error_bypass!r}: "
                "expected the name of one of its layers, the one that reads the sample"
            )
        self.input_error_bypass = input_error_bypass

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read the config from the dictionary of `to_dict`.

        Raises:
            StepQuantError: as for the class.
        """
        values = {key: value for key, value in config_dict.items() if key != "quant_method"}
        return super().from_dict(values, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON values in a fixed order.

        `layer_default` holds the commonest value of each key; `layers` holds only other values.
        """
        layers = {name: layer.to_dict() for name, layer in sorted(self.layers.items())}
        default = _commonest_values(list(layers.values()))
        attention = {name: entry.to_dict() for name, entry in sorted(self.attention.items())}
        known = self.architecture is not None
        return {
            **({"architecture": _sorted(self.architecture or {})} if known else {}),
            **({"attention": attention} if attention else {}),
            "float_layers": _sorted(self.float_layers),
            "format_version": self.format_version,
            **({"input_error_bypass": self.input_error_bypass} if self.input_error_bypass else {}),
            "layer_default": default,
            "layers": {
                name: {
                    k: value
                    for k, value in layer.items()
                    if k not in default or value != default[k]
                }
                for name, layer in layers.items()
            },
            "provenance": _sorted(self.provenance),
            "quant_method": self.quant_method.value,
            "recipe": _sorted(self.recipe),
            **({"rewritten_layers": self.rewritten_layers} if self.rewritten_layers else {}),
            "scheme": _sorted(self.scheme),
            "steps": self.steps,
        }

    def layers_json(self) -> str:
        """Return layers, attention, bypass and architecture as canonical JSON, for the checksum."""
        layers: dict[str, Any] = {name: layer.to_dict() for name, layer in self.layers.items()}
        layers |= {name: entry.to_dict() for name, entry in self.attention.items()}
        if self.input_error_bypass is not None:
            layers["/input_error_bypass"] = self.input_error_bypass
        if self.architecture is not None:
            layers["/architecture"] = self.architecture
        if self.rewritten_layers:
            layers["/rewritten_layers"] = self.rewritten_layers
        return json.dumps(layers, sort_keys=True, separators=(",", ":"))

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return `to_dict` as indented JSON; the base class would call a `to_diff_dict`."""
        del use_diff
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepQuantConfig) and self.to_dict() == other.to_dict()

    def __str__(self) -> str:
        """As diffusers prints configs: the class and its JSON. `repr` is short."""
        return f"{type(self).__name__} {self.to_json_string()}"

    def __repr__(self) -> str:
        return (
            f"StepQuantConfig(format_version={self.format_version}, scheme={self.scheme}, "
            f"layers={len(self.layers)}, float_layers={len(self.float_layers)}, "
            f"steps={self.steps})"
        )


def _check_version(version: Any) -> int:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise StepQuantError(
            f"format_version of the quantization config is {version!r}: expected a whole number "
            f"from 1 to {FORMAT_VERSION}"
        )
    if version > FORMAT_VERSION:
        raise StepQuantError(
            f"the checkpoint has format version {version}: expected at most {FORMAT_VERSION}, the "
            "newest that this stepquant reads; upgrade stepquant"
        )
    return version


def _json_object(key: str, value: dict[str, Any] | None) -> dict[str, Any]:
    value = {} if value is None else value
    try:
        if isinstance(value, dict):
            return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StepQuantError(
            f"{key} of the quantization config has a value that JSON cannot express ({error}): "
            "expected numbers, texts, lists and objects"
        ) from error
    raise StepQuantError(
        f"{key} of the quantization config is {value!r}: expected an object with named values"
    )


def _sorted(value: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value, sort_keys=True))


def _resolve_layers(
    layers: dict[str, LayerConfig | dict[str, Any]] | None,
    default: dict[str, Any] | None,
    steps: int,
) -> dict[str, LayerConfig]:
    default = _json_object("layer_default", default)
    layers = {} if layers is None else layers
    if not isinstance(layers, dict):
        raise StepQuantError(
            f"layers of the quantization config is {layers!r}: expected an object with one entry "
            "for each packed layer"
        )
    resolved = {}
    for name, layer in layers.items():
        if not isinstance(layer, LayerConfig):
            overrides = _json_object(f"layers['{name}']", layer)
            layer = LayerConfig.from_dict(name, {**default, **overrides})
        if layer.steps not in (1, steps):
            raise StepQuantError(
                f"steps of layer '{name}' in the quantization config is {layer.steps}: expected "
                f"{steps}, the length of the step grid, or 1 for a static layer"
            )
        resolved[name] = layer
    return resolved


def _resolve_attention(
    attention: dict[str, AttentionConfig | dict[str, Any]] | None, steps: int
) -> dict[str, AttentionConfig]:
    attention = {} if attention is None else attention
    if not isinstance(attention, dict):
        raise StepQuantError(
            f"attention of the quantization config is {attention!r}: expected an object with one "
            "entry for each attention with packed products"
        )
    resolved = {}
    for name, entry in attention.items():
        if not isinstance(entry, AttentionConfig):
            entry = AttentionConfig.from_dict(name, entry)
        if entry.steps not in (1, steps):
            raise StepQuantError(
                f"steps of attention '{name}' in the quantization config is {entry.steps}: "
                f"expected {steps}, the length of the step grid, or 1 for static tables"
            )
        resolved[name] = entry
    return resolved


def _commonest_values(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the commonest value of each key that all of `layers` have."""
    default = {}
    for key in layers[0] if layers else ():
        if not all(key in layer for layer in layers):
            continue
        counts = Counter(json.dumps(layer[key]) for layer in layers)
        commonest = min(counts, key=lambda text: (-counts[text], text))
        default[key] = json.loads(commonest)
    return default
