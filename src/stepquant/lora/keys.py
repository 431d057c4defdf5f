"""Mapping of the names in a LoRA's file to the layers of a pipeline.

Names differ by trainer. diffusers knows most of them and converts them (`lora_state_dict` of the
pipeline's class). This module brings the converted names to one form:
`component.layer.lora_A.weight`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType
from torch import Tensor, nn

from stepquant.lora.files import LoraFile
from stepquant.models.stand_in import original
from stepquant.runtime.layers.adapters import adapted_layer
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.lora_branch import Layer
from stepquant.support.errors import StepQuantError
from stepquant.support.safetensors_file import first_line

PEFT_PREFIX = "base_model.model."
MATRIX = re.compile(r"(?P<layer>.+)\.lora_(?P<which>[AB])(\.[^.]+)?\.weight")
MOST_REPEATS = 2  # of a pattern in a LoRA's settings: more may take forever to match


@dataclass(frozen=True)
class LoraWeights:
    """LoRA of one layer: `A [r, C_in, ...]`, `B [C_out, r, ...]`, and `factor`, `alpha / r`."""

    A: Tensor
    B: Tensor
    factor: float


def lora_layers(
    file: LoraFile, pipeline: Any, denoiser: str
) -> dict[tuple[str, str], tuple[Layer, LoraWeights]]:
    """Return the layers that the LoRA changes, by `(component, layer name)`, with its matrices.

    Names without a component belong to the component `denoiser`.

    Raises:
        StepQuantError: `pipeline` has no such layer, a shape does not fit, a matrix lacks its
            partner, or a setting makes the adapter more than a plain LoRA. The message names the
            key or the setting.
    """
    tensors, alphas = _converted(file, pipeline, denoiser)
    pairs: dict[tuple[str, str], dict[str, Tensor]] = {}
    keys: dict[tuple[str, str, str], str] = {}
    for key, tensor in tensors.items():
        component, name = _component(key, tensors, pipeline, denoiser)
        found = MATRIX.fullmatch(_peft_name(name, component == denoiser, pipeline, component))
        if found is None:
            raise StepQuantError(
                f"{file.label} has the key '{key}': expected names that end with lora_A.weight or "
                "lora_B.weight, or those of kohya's trainer for this pipeline"
            )
        pairs.setdefault((component, found["layer"]), {})[found["which"]] = tensor
        keys[component, found["layer"], found["which"]] = key
    scales = {
        _alpha_place(key, tensors, pipeline, denoiser): (key, alpha)
        for key, alpha in alphas.items()
    }
    layers: dict[tuple[str, str], tuple[Layer, LoraWeights]] = {}
    for (component, name), pair in pairs.items():
        key = next(keys[component, name, which] for which in pair)
        layer = _layer(file.label, key, pipeline, component, name)
        if len(pair) != 2:
            raise StepQuantError(
                f"{file.label} has the key '{key}' without its partner: expected lora_A and "
                f"lora_B of the layer '{name}'; the file is incomplete"
            )
        for which in "AB":
            _check_shape(
                file.label, keys[component, name, which], which, pair[which], pair["B"], layer
            )
        rank = pair["A"].shape[0]
        config = file.configs.get(component, file.configs.get("", {}))
        _, alpha = scales.pop((component, name), ("", None))
        factor = _factor(file.label, config, name, rank, alpha)
        layers[component, name] = (layer, LoraWeights(pair["A"], pair["B"], factor))
    for key, _ in scales.values():
        raise StepQuantError(
            f"{file.label} has '{key}' without the matrices of that layer: expected lora_A and "
            "lora_B beside it; the file is incomplete"
        )
    return layers


def models_of(pipeline: Any) -> dict[str, Any]:
    """Return the modules of a pipeline by component name.

    The function unwraps modules from `torch.compile` and from `StandIn`. It reads the pipeline's
    attributes, because a user's own pipeline class may not have a correct `components`.
    """
    parts = {name: part for name, part in vars(pipeline).items() if isinstance(part, nn.Module)}
    return {name: original(getattr(part, "_orig_mod", part)) for name, part in parts.items()}


def _converted(
    file: LoraFile, pipeline: Any, denoiser: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the tensors by their names in diffusers or peft, and the alphas by name.

    Raises:
        StepQuantError: diffusers cannot convert the names for this kind of pipeline.
    """
    tensors = dict(file.tensors)
    if all(key.startswith(PEFT_PREFIX) for key in tensors):
        model = models_of(pipeline)[denoiser]
        bare = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
        # Other trainers use the prefix as well, before names that diffusers must convert.
        if next(iter(bare)).partition(".lora_")[0] in dict(model.named_modules()):
            return bare, {}
    if not hasattr(pipeline, "lora_state_dict"):
        return tensors, {}
    more = {"unet_config": pipeline.unet.config} if denoiser == "unet" else {}
    try:
        converted, *rest, _ = pipeline.lora_state_dict(
            tensors, return_alphas=True, return_lora_metadata=True, **more
        )
        alphas = {key: float(value) for key, value in (rest[0] or {}).items()} if rest else {}
        return dict(converted), alphas
    except Exception as error:  # whatever the conversion makes of names that it does not expect
        raise StepQuantError(
            f"{file.label}, with keys like '{next(iter(file.tensors))}', cannot be read for "
            f"{type(pipeline).__name__} ({first_line(error)}): expected a LoRA that was trained "
            "for this kind of pipeline"
        ) from error


def _component(
    key: str, tensors: Mapping[str, Tensor], pipeline: Any, denoiser: str
) -> tuple[str, str]:
    """Return the component that `key` belongs to, and the rest of the name."""
    parts = models_of(pipeline)
    first, _, rest = key.partition(".")
    if first in parts:
        return first, rest
    if any(name.partition(".")[0] in parts for name in tensors):
        return first, rest  # if some keys name a component, all must; `_layer` reports this one
    return denoiser, key


def _peft_name(name: str, of_denoiser: bool, pipeline: Any, component: str) -> str:
    """Return `name` in the form of peft, `layer.lora_A.weight`."""
    if ".lora_A." not in name and ".lora_B." not in name:
        if not of_denoiser:  # the table of this type covers the newer names as well
            (name,) = convert_state_dict_to_peft({name: None}, StateDictType.DIFFUSERS_OLD)
        (name,) = convert_unet_state_dict_to_peft({name: None})
    model = models_of(pipeline).get(component)
    if not of_denoiser and not hasattr(model, "text_model"):  # older files have the prefix
        name = name.removeprefix("text_model.")
    return name.replace(".processor.", ".")


def _alpha_place(
    key: str, tensors: Mapping[str, Tensor], pipeline: Any, denoiser: str
) -> tuple[str, str]:
    """Return the component and the layer that an alpha belongs to."""
    component, name = _component(key.removesuffix(".alpha"), tensors, pipeline, denoiser)
    name = _peft_name(name, component == denoiser, pipeline, component)
    return component, name.partition(".lora_")[0]


def _layer(label: str, key: str, pipeline: Any, component: str, name: str) -> Layer:
    model = models_of(pipeline).get(component)
    if model is None:
        raise StepQuantError(
            f"{label} has the key '{key}', for the component '{component}' that "
            f"{type(pipeline).__name__} does not have: expected a LoRA for this kind of pipeline"
        )
    layer = dict(model.named_modules()).get(name)
    kinds = (IntegerLayer, nn.Linear, nn.Conv2d)
    if layer is None:
        example = next((n for n, m in model.named_modules() if isinstance(m, kinds)), "none")
        raise StepQuantError(
            f"{label} has the key '{key}', but {type(model).__name__} has no layer '{name}': "
            f"expected names of its linear and conv layers, such as '{example}'; the LoRA is for "
            "another model"
        )
    if adapted_layer(layer) is not None:
        raise StepQuantError(
            f"{label} has the key '{key}', but '{name}' of {type(model).__name__} has an adapter "
            "of peft: expected none; load all LoRAs with load_lora, or all with load_lora_weights"
        )
    plain = isinstance(layer, kinds) and getattr(layer, "groups", 1) == 1
    if not plain or getattr(layer, "padding_mode", "zeros") != "zeros":
        raise StepQuantError(
            f"{label} has the key '{key}', but '{name}' of {type(model).__name__} is "
            f"{type(layer).__name__}: expected a linear layer, or a conv of one group with zero "
            "padding"
        )
    return layer  # type: ignore[return-value]


def _check_shape(label: str, key: str, which: str, tensor: Tensor, B: Tensor, layer: Layer) -> None:
    spec: Any = layer.spec if isinstance(layer, IntegerLayer) else layer
    linear = isinstance(layer, nn.Linear) or getattr(spec, "kind", "") == "linear"
    rank = B.shape[1] if B.dim() > 1 else 0
    if linear:
        sizes = (layer.in_features, layer.out_features)
        wanted = (rank, sizes[0]) if which == "A" else (sizes[1], rank)
    else:
        out = (spec.out_channels, rank, 1, 1)
        wanted = (rank, spec.in_channels, *spec.kernel_size) if which == "A" else out
    if tuple(tensor.shape) != wanted or rank < 1:
        raise StepQuantError(
            f"{label} has the shape {list(tensor.shape)} under '{key}': expected {list(wanted)}, "
            "as the layer has it; the LoRA is for a model of other sizes"
        )


def _factor(
    label: str, config: dict[str, Any], layer: str, rank: int, alpha: float | None
) -> float:
    """Return the LoRA's own factor: `alpha / r`, or `alpha / sqrt(r)` with rank-stabilized scaling.

    Without an alpha it is 1, as in diffusers.

    Raises:
        StepQuantError: alphas are there twice, or a setting makes the adapter more than a plain
            LoRA.
    """
    if config and alpha is not None:
        raise StepQuantError(
            f"{label} has alphas both as tensors and in its settings: expected one of the two"
        )
    for setting in ("use_dora", "lora_bias", "modules_to_save", "layer_replication"):
        if config.get(setting):
            raise StepQuantError(
                f"{label} was trained with {setting}={config[setting]!r}: expected a plain LoRA, "
                "of two matrices for each layer"
            )
    if alpha is None and "lora_alpha" in config:
        alpha = _number(label, "lora_alpha", config["lora_alpha"])
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise StepQuantError(
                f"{label} has the setting alpha_pattern={patterns!r}: expected an alpha for each "
                "pattern of layer names, as peft writes it"
            )
        for pattern, value in patterns.items():
            if _matches(label, pattern, layer):
                alpha = _number(label, f"alpha_pattern['{pattern}']", value)
                break
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _number(label: str, setting: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) < 1e30:
        raise StepQuantError(f"{label} has the setting {setting}={value!r}: expected a number")
    return float(value)


def _matches(label: str, pattern: str, layer: str) -> bool:
    """Whether `layer`, or the end of its name, is the pattern of a LoRA's settings."""
    if "(" in pattern or sum(map(pattern.count, "*+{")) > MOST_REPEATS or len(pattern) > 500:
        raise StepQuantError(
            f"{label} has the alpha_pattern '{pattern}': expected layer names, with at most "
            f"{MOST_REPEATS} repetitions and without groups"
        )
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", layer) is not None
    except re.error as error:
        raise StepQuantError(
            f"{label} has the alpha_pattern '{pattern}' ({error}): expected a regular expression"
        ) from error
