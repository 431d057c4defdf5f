"""Which layers of a float model a quantized layer can replace, and why others stay float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from diffusers import ModelMixin
from torch import nn

from stepquant.support.errors import StepQuantError

LAYERS = (nn.Linear, nn.Conv2d)


def why_float(
    module: nn.Module,
    *,
    any_conv: bool = False,
    subclasses: bool = False,
    shared: Collection[int] = (),
) -> str | None:
    """Why `module` stays float, as a noun phrase, or None where a quantized layer can replace it.

    Integer kernels take linear layers, and convolutions of one group with zero padding in pixels.
    `any_conv`: the quantized layer computes in float, and takes every `nn.Conv2d`. `subclasses`: a
    subclass is taken, too, if it inherits `forward`; one with its own may compute anything.
    `shared`: see `shared_weights`; such a layer would take the weight from another module.
    """
    kind = next((kind for kind in LAYERS if isinstance(module, kind)), None)
    plain = kind is not None and (
        type(module).forward is kind.forward if subclasses else type(module) is kind
    )
    if not plain:
        return f"layer of the class {type(module).__name__}"
    if id(module._parameters.get("weight")) in shared:
        return "layer that shares its weight"
    if isinstance(module, nn.Conv2d) and not any_conv:
        if module.groups != 1:
            return f"grouped conv ({module.groups} groups)"
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return f"padding {module.padding!r} of mode '{module.padding_mode}'"
    return None


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` names the module `name`, or a module around it.

    A pattern is a shell-style one, of a whole name or of neighbouring parts of it: "time_embedder",
    "blocks.0" and "blocks.*.to_q" all name `blocks.0.time_embedder.to_q`.
    """
    parts = name.split(".")
    spans = (parts[i:j] for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
    return any(fnmatchcase(".".join(span), pattern) for span in spans)


def kept_by_class(model: nn.Module) -> tuple[str, ...]:
    """Patterns of the modules that the class of `model` keeps in float32."""
    return tuple(model._keep_in_fp32_modules or ()) if isinstance(model, ModelMixin) else ()


def modules_kept_float(model: nn.Module, patterns: Iterable[str] = ()) -> dict[str, str]:
    """The layers of `model` that its class or `patterns` keep float, each with its reason.

    Model classes of diffusers name modules that must compute in float32 in `_keep_in_fp32_modules`.
    `patterns` are the user's `modules_to_not_convert`; see `matches`.
    """
    asked = {pattern: f"modules_to_not_convert has '{pattern}'" for pattern in patterns}
    reasons = {
        entry: f"{type(model).__name__} keeps '{entry}' in float32"
        for entry in kept_by_class(model)
    }
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            for pattern, reason in (*asked.items(), *reasons.items()):
                if matches(name, pattern):
                    found.setdefault(name, reason)
    return found


def unmatched(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Those of `patterns` that name no module of `model`."""
    names = [name for name, _ in model.named_modules() if name]
    return [each for each in patterns if not any(matches(name, each) for name in names)]


def check_patterns(patterns: object, what: str) -> tuple[str, ...]:
    """`patterns` as a tuple; StepQuantError, naming `what`, unless they are a list of texts."""
    listed = isinstance(patterns, list | tuple | set | frozenset)
    if not listed or not all(isinstance(each, str) and each for each in patterns):  # type: ignore[attr-defined]
        raise StepQuantError(
            f"{what} is {patterns!r}: expected a list of names or patterns of modules"
        )
    ordered = sorted(patterns) if isinstance(patterns, set | frozenset) else patterns
    return tuple(ordered)  # type: ignore[arg-type]


def shared_weights(model: nn.Module) -> set[int]:
    """The ids of the parameters that more than one module of `model` holds."""
    held = (parameter for module in model.modules() for parameter in module._parameters.values())
    counts = Counter(id(parameter) for parameter in held if parameter is not None)
    return {key for key, count in counts.items() if count > 1}
