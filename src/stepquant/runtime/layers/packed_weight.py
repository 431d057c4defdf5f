"""The weight of one input part: packed bytes, and a kernel's layout of them.

- Memory mode "fast", the default: the layout stays in memory, at 8 bits per weight, or 4 bits if
  the native kernel runs and 4 suffice. The layer drops the packed bytes and restores them from the
  layout on demand (`released`).
- Memory mode "low": the packed bytes stay in memory. Each call lays the weight out, one input part
  after another, and drops the layout.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stepquant.runtime.kernels import BoundWeight, Kernel, State, TakesCodes, choose
from stepquant.runtime.layers.differences import differences_of, packed_of
from stepquant.runtime.layers.released import Released, whole
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.support.refusal import Refusal

FAST, LOW = MODES = ("fast", "low")
PREPARING = threading.RLock()
"""Lock for laying out layers. All layers share it, because locks cannot be copied with a layer."""


class Layout(NamedTuple):
    """A weight in a kernel's layout; immutable."""

    kernel: Kernel
    spec: LayerSpec
    weight: Tensor

    def packed(self, zero_point: Tensor, channel_bits: Tensor | None) -> Tensor:
        """The packed bytes, uint8 `[bytes]` on the CPU; for arguments see `differences_of`."""
        differences = self.kernel.differences(self.weight, self.spec)
        return packed_of(differences, zero_point, channel_bits, self.spec)


class PackedWeight:
    """The weight of input part number `index` of an integer layer.

    - `spec`: shape and bits of the part.
    - `first_byte`: offset of its bytes in `weight_packed`.
    - `buffers`: the layer's buffers, looked up at each use, because other code may move them.
    - `memory`: the memory mode, see the module docstring.

    `prepare` sets the attributes below.
    """

    kernel: Kernel
    refusals: dict[str, Refusal]
    """By kernel name: why preferred kernels cannot run the part."""
    reasons: list[str]
    """The refusals as text."""
    layout: Layout | None
    """None in the memory mode "low"."""
    rest: tuple[Tensor, ...]
    """Small tensors that the kernel derived from the weight."""

    def __init__(
        self,
        index: int,
        spec: LayerSpec,
        first_byte: int,
        buffers: Mapping[str, Tensor | None],
        memory: str = FAST,
    ) -> None:
        self.index, self.spec, self.memory = index, spec, memory
        self._bytes = slice(first_byte, first_byte + spec.packed_bytes)
        self._buffers = buffers
        self._bound: BoundWeight | None = None

    def packed(self) -> Tensor:
        """The packed bytes of the part, uint8 `[bytes]`, restored if they were dropped."""
        return whole(self._buffer("weight_packed"))[self._bytes]

    def differences(self) -> Tensor:
        """`code - zero point` on the layer's device, int8; see `differences.differences_of`."""
        zero_point = self._buffer("weight_zero_point")[self.index]
        return differences_of(self.packed(), zero_point, self._buffers["channel_bits"], self.spec)

    def scale(self) -> Tensor:
        """The step size of `differences`, float32 `[C_out]`."""
        scale = self._buffer("weight_scale")[self.index]
        return scale / 2 if self.spec.half_zero_points else scale

    def prepare(self, device: torch.device, backend: str) -> None:
        """Choose a kernel and lay the weight out for it.

        Raises StepQuantError if no kernel has the name `backend`; see `kernels.choose`.
        """
        choice = choose(self.spec, device, backend)
        self.kernel, self.refusals, self.reasons = choice.kernel, choice.refusals, choice.reasons
        weight, *rest = self.kernel.prepare(self.differences(), self.scale(), self.spec)
        self.layout = Layout(self.kernel, self.spec, weight) if self.memory == FAST else None
        self.rest, self._bound = tuple(rest), None

    def state(self) -> State:
        """The kernel's state. In the memory mode "low", the caller holds its only copy."""
        weight = self._lay_out() if self.layout is None else self.layout.weight
        return (weight, *self.rest)

    @torch.compiler.disable
    def _lay_out(self) -> Tensor:
        return self.kernel.lay_out(self.differences(), self.scale(), self.spec)

    def bound(self, bias: Tensor | None, step_bias: Tensor | None) -> BoundWeight:
        """The weight with these biases, for calls with codes; cached in the memory mode "fast".

        `bias`: float32 `[C_out]`, or None. `step_bias`: float32 `[T, C_out]`, or None.
        """
        traced = torch.compiler.is_compiling()
        # Traced tensors have no addresses to cache, and reading the cache of eager calls would make
        # the graph depend on it.
        known = None if traced else self._bound
        if known is not None and known.is_current(bias, step_bias):
            return known
        assert isinstance(self.kernel, TakesCodes)  # slow, so not in every call
        bound = self.kernel.bind(self.state(), bias, step_bias, self.spec)
        if self.layout is not None and not traced:
            self._bound = bound
        return bound

    def held(self) -> list[Tensor]:
        """The tensors in memory besides the layer's buffers: the layout and the small tensors."""
        return [*self.rest] if self.layout is None else [self.layout.weight, *self.rest]

    def read(self) -> list[Tensor]:
        """The tensors that calls read, including buffers."""
        return [*self.held(), *([] if self._bound is None else self._bound.tensors())]

    def _buffer(self, name: str) -> Tensor:
        found = self._buffers[name]
        assert found is not None
        return found


def released(weights: Sequence[PackedWeight], buffers: Mapping[str, Tensor | None]) -> Tensor:
    """The replacement for `weight_packed` once the weights of all parts are laid out.

    That is a stand-in without memory. In the memory mode "low", and if the layouts cannot restore
    the exact bytes (unused bits of the last byte, say), it is `weight_packed` itself.
    """
    packed, zero_points = buffers["weight_packed"], buffers["weight_zero_point"]
    channel_bits = buffers["channel_bits"]
    assert packed is not None and zero_points is not None
    layouts = [weight.layout for weight in weights if weight.layout is not None]
    if len(layouts) < len(weights):
        return packed
    bits = None if channel_bits is None else channel_bits.clone()
    # Copies that nothing changes: the stand-in stays valid whatever happens to the layer.
    restored = functools.partial(_packed_again, layouts, zero_points.clone(), bits)
    return Released(packed.numel(), restored) if torch.equal(restored(), packed) else packed


def _packed_again(
    layouts: Sequence[Layout], zero_points: Tensor, channel_bits: Tensor | None
) -> Tensor:
    pairs = zip(layouts, zero_points, strict=True)
    return torch.cat([layout.packed(zero_point, channel_bits) for layout, zero_point in pairs])
