"""Which layers of a float model a quantized layer can replace, and why others stay float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from torch import nn

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


def shared_weights(model: nn.Module) -> set[int]:
    """The ids of the parameters that more than one module of `model` holds."""
    held = (parameter for module in model.modules() for parameter in module._parameters.values())
    counts = Counter(id(parameter) for parameter in held if parameter is not None)
    return {key for key, count in counts.items() if count > 1}
