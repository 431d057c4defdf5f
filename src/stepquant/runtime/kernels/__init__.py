"""Integer kernels of one signature, and the table that chooses between them.

A kernel computes, for one input part,

    y = act_scale * weight_scale * sum((codes - act_zero_point) * weight) + bias (+ accumulate)

with integer sums, from `codes` uint8 (`[B, C, H, W]`, or `[..., C]` for linear), `weight` int8
differences `code - zero point` (`[C_out, C_in, kh, kw]` or `[C_out, C_in]`), `act_scale [1]`
float32 and `act_zero_point [1]` int32, `weight_scale [C_out]` float32; `y` is float32. Zero padding
is float zero, that is, code `act_zero_point`. Sums are exact; `sum(codes * weight)` and the zero
point's share may be joined in float32, which is exact as long as each is below 2^24.

`prepare` gives the state that `run` takes: first the weight as `lay_out` makes it, then small
tensors of the weight. `differences` gives back the weight that was laid out, bit for bit.
"""

from __future__ import annotations

from types import ModuleType

import torch

from stepquant.runtime.kernels import int_mm, native, onednn, reference
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.support.errors import StepQuantError

# In order of preference; the last one takes every layer on every device.
KERNELS: dict[str, ModuleType] = {
    "native": native,
    "onednn": onednn,
    "int_mm": int_mm,
    "reference": reference,
}
# Those that take codes where they lie, in a padded image (`runtime.layers.codes`).
TAKE_CODES = (native, onednn)


def choose(
    spec: LayerSpec, device: torch.device, backend: str = "auto"
) -> tuple[str, ModuleType, list[str]]:
    """`(name, kernel, reasons)`: the first kernel that takes the layer, and why others did not.

    `backend` names one kernel, or is "auto". A layer that the named kernel cannot take runs on the
    reference kernel, with the reason.
    """
    if backend != "auto":
        if backend not in KERNELS:
            raise StepQuantError(
                f"unknown backend '{backend}': expected auto or one of {', '.join(KERNELS)}"
            )
        reason = KERNELS[backend].why_not(spec, device)
        if reason and backend != "reference":
            kernel = KERNELS["reference"]
            return "reference", kernel, [f"{backend}: {reason}"]
        return backend, KERNELS[backend], []
    reasons: list[str] = []
    for name, kernel in KERNELS.items():
        reason = kernel.why_not(spec, device)
        if reason is None:
            return name, kernel, reasons
        reasons.append(f"{name}: {reason}")
    raise AssertionError("the reference kernel takes every layer")
