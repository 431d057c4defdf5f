"""Low-rank float branches beside a layer: `y + scale * B(A(x))` (LoRA, Hu et al. 2021).

State dicts leave branches out, so a model saves the same bytes with and without them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from stepquant.runtime.layers.integer import IntegerLayer

Layer = IntegerLayer | nn.Linear | nn.Conv2d
PREFIX = "of_"  # without it, a LoRA's name could clash with an attribute of nn.Module


class LoraBranch(nn.Module):
    """The branch of one LoRA at one layer.

    - `A`: float32 `[r, C_in]`, or `[r, C_in, kh, kw]` with the layer's stride, padding and
      dilation.
    - `B`: float32 `[C_out, r]`, or `[C_out, r, 1, 1]`.
    - `factor`: `alpha / r`, from the LoRA's file.
    - `scale`: the user's weight, which may change at any time; branches with scale 0 do not run.
    """

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor, factor: float, scale: float) -> None:
        super().__init__()
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        self.factor, self.scale = factor, scale
        self.window: tuple[Any, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """`scale * factor * B(A(x))` in the dtype of `A`, for float `x` of any dtype."""
        x = x.to(self.A.dtype)
        if self.A.dim() == 2:
            y = F.linear(F.linear(x, self.A), self.B)
        else:
            y = F.conv2d(F.conv2d(x, self.A, None, *self.window), self.B)
        return y * (self.scale * self.factor)


class LoraBranches(nn.ModuleDict):
    """The branches of one layer, by the name of their LoRA."""

    handle: RemovableHandle | None = None  # of the forward hook, on float layers only

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """`y`, the layer's result for `x`, plus those of all branches, in the dtype of `y`."""
        for branch in self.values():
            assert isinstance(branch, LoraBranch)
            if branch.scale != 0:
                y = y + branch(x).to(y.dtype)
        return y


def attach_branch(layer: Layer, name: str, branch: LoraBranch) -> None:
    """Make `layer` add the result of `branch`; moves the branch to the layer's device.

    An integer layer calls its branches itself. A float layer gets a forward hook.
    """
    if isinstance(layer, IntegerLayer):
        device = layer.weight_packed.device
        spec = layer.spec
        branch.window = (spec.stride, spec.padding, spec.dilation)
    else:
        device = layer.weight.device
        if isinstance(layer, nn.Conv2d):
            branch.window = (layer.stride, layer.padding, layer.dilation)
    branches = branches_of(layer)
    if branches is None:
        branches = LoraBranches()
        layer.lora = branches
        if not isinstance(layer, IntegerLayer):
            branches.handle = layer.register_forward_hook(_add_branches)
    branches[PREFIX + name] = branch.to(device)


def detach_branch(layer: Layer, name: str) -> None:
    """Remove the branch `name`; removing the last branch restores the layer."""
    branches = branches_of(layer)
    assert branches is not None
    del branches[PREFIX + name]
    if len(branches) > 0:
        return
    if branches.handle is not None:
        branches.handle.remove()
    del layer.lora
    if isinstance(layer, IntegerLayer):
        layer.lora = None


def branches_of(layer: nn.Module) -> LoraBranches | None:
    """The branches of `layer`, or None."""
    found = getattr(layer, "lora", None)
    return found if isinstance(found, LoraBranches) else None


def named_branches(model: nn.Module) -> list[tuple[str, nn.Module, str, LoraBranch]]:
    """`(layer's name, layer, LoRA's name, branch)` for each branch in `model`."""
    return [
        (layer_name, layer, key.removeprefix(PREFIX), branch)
        for layer_name, layer in model.named_modules()
        for key, branch in (branches_of(layer) or {}).items()
        if isinstance(branch, LoraBranch)
    ]


def _add_branches(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    branches = branches_of(layer)
    return y if branches is None else branches.add_to(y, inputs[0])
