"""A layer that keeps its weight packed and lays it out for the kernels that run it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stepquant.numerics import check_bits, max_code
from stepquant.quantizers.step_grid import StepContext
from stepquant.runtime.kernels import Backend
from stepquant.runtime.layers.dtype_marker import MarksDtype, is_marker, values_of
from stepquant.runtime.layers.input_part import InputPart
from stepquant.runtime.layers.layer_tensors import LAYER_TENSORS, LayerSizes, names_of
from stepquant.runtime.layers.packed_weight import FAST, PREPARING, PackedWeight, released
from stepquant.runtime.layers.prepared_layer import PreparedLayer
from stepquant.runtime.layers.released import Released, whole
from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.layer_spec import LayerSpec


class LaidOutLayer(MarksDtype):
    """Base class of the integer layers: packed tensors, and their layout for kernels.

    `layer_tensors.LAYER_TENSORS` declares the buffers; absent ones are None.

    `backend` chooses the kernel (see `kernels.choose`), `memory` the memory mode (see
    `packed_weight`). Changes take effect when the first call after `drop_layout` lays the weight
    out.
    """

    channel_dim: int
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    channel_bits: Tensor | None
    act_scale: Tensor
    act_zero_point: Tensor
    bias: Tensor | None
    step_bias: Tensor | None
    act_channel_scale: Tensor | None

    def __init__(
        self,
        spec: LayerSpec,
        splits: tuple[int, ...],
        steps: int,
        context: StepContext,
        optional: Collection[str] = (),
    ) -> None:
        """Allocate buffers of the right shapes, for `load_state_dict` or `simulation.packing`.

        Args:
            spec: Shape and bits of the layer, over all input parts.
            splits: In-channels of each input part.
            steps: Rows of the step tables; 1 if all steps share one.
            context: Provides the row of the current step.
            optional: Names of the optional tensors that the layer has.

        Raises:
            StepQuantError: `spec` has weight or activation bits that are not supported.
        """
        super().__init__()
        check_bits(spec.weight_bits, "weight bits")
        check_bits(spec.activation_bits, "activation bits")
        self.spec, self.splits, self.steps, self.context = spec, splits, steps, context
        self.backend: str = Backend.AUTO.value
        self.memory = FAST
        present = names_of(spec, optional)
        for name, tensor in LAYER_TENSORS.items():
            self.register_buffer(name, tensor.empty(self.sizes()) if name in present else None)
        if self.channel_bits is not None:
            self.channel_bits.fill_(spec.weight_bits)
        self._prepared: PreparedLayer | None = None
        self.mark(torch.float32)

    def sizes(self) -> LayerSizes:
        """The sizes that determine the buffers' shapes."""
        return LayerSizes(self.spec, self.splits, self.steps)

    def present(self) -> list[str]:
        """The names of the tensors that the layer has."""
        return [name for name in LAYER_TENSORS if self._buffers[name] is not None]

    def part_specs(self) -> list[LayerSpec]:
        """The spec of each input part."""
        return [replace(self.spec, in_channels=channels) for channels in self.splits]

    def float_parameters(self) -> int:
        """The number of parameters of the float layer."""
        return values_of((self.spec.out_channels, self.spec.columns), self.bias)

    def packed_weights(self) -> list[PackedWeight]:
        """The weight of each input part: the prepared weights, or new views of the buffers."""
        prepared = self._prepared
        if prepared is not None:
            return [part.weight for part in prepared.parts]
        found, first = [], 0
        for index, spec in enumerate(self.part_specs()):
            found.append(PackedWeight(index, spec, first, self._buffers, self.memory))
            first += spec.packed_bytes
        return found

    def packed_bytes(self) -> Tensor:
        """The packed weight, uint8 `[bytes]`: the buffer, or the bytes restored from the layout."""
        return whole(self.weight_packed)

    def weight_differences(self) -> list[Tensor]:
        """`code - zero point` of each part, int8 `[C_out, C_part, kh, kw]` (linear: two dims).

        The tensors are on the CPU. If the spec sets `half_zero_points`, they count half steps:
        `2 * code - 2 * zero point`.
        """
        return [weight.differences().cpu() for weight in self.packed_weights()]

    def difference_scales(self) -> Tensor:
        """The step size of `weight_differences`, float32 `[parts, C_out]`."""
        return self.weight_scale / 2 if self.spec.half_zero_points else self.weight_scale

    def float_weight(self) -> Tensor:
        """The dequantized weight, float32 `[C_out, C_in, ...]`, on the CPU."""
        parts = [
            difference.to(torch.float32) * scale.cpu().view(-1, *(1,) * (difference.dim() - 1))
            for difference, scale in zip(
                self.weight_differences(), self.difference_scales(), strict=True
            )
        ]
        return torch.cat(parts, dim=1)

    @torch.compiler.disable  # graphs treat the result as a constant
    def prepare(self) -> PreparedLayer:
        """Choose kernels and lay the weight out for them, now instead of in the first call.

        Raises StepQuantError if no kernel has the name `backend`.
        """
        with PREPARING:
            device = self.weight_scale.device
            self.drop_layout()
            parts, start = [], 0
            for weight in self.packed_weights():
                weight.prepare(device, self.backend)
                channels, factors = weight.spec.in_channels, None
                if self.act_channel_scale is not None:
                    factors = 1.0 / self.act_channel_scale[start : start + channels]
                scale, zero_point = self.act_scale[weight.index], self.act_zero_point[weight.index]
                largest = max_code(self.spec.activation_bits)
                grid = Grid(scale, zero_point, None, largest, factors)
                parts.append(InputPart(weight, grid, start))
                start += channels
            prepared = PreparedLayer(
                *(parts, self.splits, self.channel_dim, self.steps != 1),
                *(self.context, self._buffers, device),
            )
            # On other devices, and under its hooks, accelerate moves the layer's tensors itself.
            if self.weight_packed.is_cpu and not hasattr(self, "_hf_hook"):
                weights = [part.weight for part in parts]
                self.weight_packed = released(weights, self._buffers)
            self._prepared = prepared  # last, because other threads may use it from now on
            return prepared

    def drop_layout(self) -> None:
        """Drop the kernel's layout and keep the packed bytes; the next call lays out again."""
        with PREPARING:
            self.weight_packed, self._prepared = self.packed_bytes(), None

    def prepared(self) -> PreparedLayer:
        """The layer with its weight laid out on the tensors' current device.

        accelerate's hooks move tensors to another device without telling the module, so each call
        compares the device. In-place changes of scales or zero points cause a new layout. If
        several threads call first, one prepares the layer and the others wait.
        """
        found = self._prepared
        return found if found is not None and self._is_fresh(found) else self._laid_out()

    def _is_fresh(self, prepared: PreparedLayer) -> bool:
        scale = self._buffers["weight_scale"]  # in every call, and faster than the attribute
        assert scale is not None
        # Graphs treat the layout as a constant.
        if torch.compiler.is_compiling():
            return prepared.device == scale.device
        outdated = prepared.is_outdated(replaced="_hf_hook" not in self.__dict__)
        return prepared.device == scale.device and not outdated

    @torch.compiler.disable
    def _laid_out(self) -> PreparedLayer:
        with PREPARING:
            found = self._prepared
            return found if found is not None and self._is_fresh(found) else self.prepare()

    def prepared_parts(self) -> list[InputPart]:
        """The input parts of `prepared()`."""
        return self.prepared().parts

    def kernel_names(self) -> list[str]:
        """The name of the kernel that runs each part."""
        return [part.weight.kernel.name for part in self.prepared_parts()]

    def fallback_reasons(self) -> list[str]:
        """Why parts run on the reference kernel: one text for each such part with a reason."""
        return [
            "; ".join(part.weight.reasons)
            for part in self.prepared_parts()
            if part.weight.kernel.name == Backend.REFERENCE and part.weight.reasons
        ]

    def weight_tensors(self) -> list[Tensor]:
        """All tensors that the weight currently keeps in memory, without the biases."""
        buffers = [self._buffers[name] for name, each in LAYER_TENSORS.items() if each.is_weight]
        held = [each for each in buffers if each is not None and not isinstance(each, Released)]
        # A kernel may use a row of a buffer without a copy.
        own = {buffer.untyped_storage().data_ptr() for buffer in held}
        prepared = self._prepared
        for part in [] if prepared is None else prepared.parts:
            weight = part.weight
            held += [] if weight.layout is None else [weight.layout.weight]
            held += [each for each in weight.rest if each.untyped_storage().data_ptr() not in own]
        return held

    def tensors_read(self) -> list[Tensor]:
        """The strided tensors that calls of the prepared layer read, apart from its buffers.

        oneDNN's weights, which have an opaque layout, are left out.
        """
        prepared = self._prepared
        parts = [] if prepared is None else prepared.parts
        found = [tensor for part in parts for tensor in part.read()]
        return [each for each in found if each.layout == torch.strided]

    def _apply(self, fn: Any, recurse: bool = True) -> LaidOutLayer:
        self.drop_layout()  # the kernel's layout is valid only on the old device

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if is_marker(self, tensor):
                return moved
            # Scales and biases stay float32 in a bf16 or fp16 model.
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars:  # without it, torch detaches the stand-in, which restores the bytes
            destination[f"{prefix}weight_packed"] = self.packed_bytes()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_layout()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # The kernel's layout cannot be copied, so a copy lays out its weight again.
        buffers = {**self._buffers, "weight_packed": self.packed_bytes()}
        return {**self.__dict__, "_buffers": buffers, "_prepared": None}
