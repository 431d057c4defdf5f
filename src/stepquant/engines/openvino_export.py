"""A packed denoiser as one module of operators that OpenVINO runs on integers.

A packed layer computes `s * (sum(q * w) - z * sum(w)) + bias` from codes `q`, with the step's scale
`s` and zero point `z`. Here `q` is a FakeQuantize of the constant range 0..2^bits - 1 and step 1
over the layer's own whole numbers `round(x / s) + z`: it only clamps, so that codes are those of
the packed layer bit by bit. With weights that are int8 differences times a scale, OpenVINO's low
precision transformations make of it a convolution or matmul of u8 by i8 with int32 sums. They need
ranges that are constants; `s` and `z` stay outside, so that one compiled model serves all steps.

The zero point's share `z * sum(w)` is taken off the sum. Zero padding has the code zero here, not
`z`: at borders `sum(w)` is over what lies in the image.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepquant.models.surgery import copy_around, replace_modules
from stepquant.numerics import max_code
from stepquant.quantizers.activation import spread_rows
from stepquant.quantizers.step_grid import StepContext
from stepquant.runtime.kernels.onednn import ONEDNN, pairs_saturate
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.integer_attention import PackedAttention
from stepquant.runtime.layers.lora_branch import named_branches
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.support.errors import StepQuantError

DEFAULT = "draw with the default backend, which runs it"


class ExportLayer(nn.Module):
    """What a `IntegerLayer` computes in float32, from whole numbers.

    Its constants for a shape of its input are found by a forward that is not traced, and are there
    in the one that is.
    """

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        self.spec, self.splits, self.context = layer.spec, layer.splits, layer.context
        self.channel_dim, self.bypass = layer.channel_dim, layer.bypass
        scale, zero_point = layer.act_scale.cpu(), layer.act_zero_point.cpu().to(torch.float32)
        self.steps = 1 if _alike(scale) and _alike(zero_point) else layer.steps
        self.scale = scale[:, : self.steps]  # [P, T]
        self.zero_point = zero_point[:, : self.steps]
        self.differences = layer.weight_differences()
        self.weight_scale = layer.difference_scales().cpu()  # [P, C_out]
        self.bias, self.step_bias = _cpu(layer.bias), _cpu(layer.step_bias)
        channels = layer.act_channel_scale
        self.inverse_channel_scale = None if channels is None else 1.0 / channels.cpu()
        self._sums: dict[tuple[int, ...], Tensor] = {}  # see `_weight_sums`

    def forward(self, x: Tensor) -> Tensor:
        """As the packed layer, for `x` in float32."""
        scaled, inverse = x, None
        if self.inverse_channel_scale is not None:
            inverse = self._along_channels(self.inverse_channel_scale, x)
            scaled = x * inverse
        parts = scaled.split(self.splits, self.channel_dim) if len(self.splits) > 1 else (scaled,)
        y: Tensor | None = None
        errors = []
        for index, part in enumerate(parts):
            scale, zero_point = (self._of_step(t[index], x) for t in (self.scale, self.zero_point))
            whole = torch.round(part * (1.0 / scale)) + zero_point
            largest = max_code(self.spec.activation_bits)
            codes = torch.fake_quantize_per_tensor_affine(whole, 1.0, 0, 0, largest)
            if self.bypass is not None:
                errors.append(part - (codes - zero_point) * scale)
            sums = self._weight_sums(index, part)
            if self.steps == 1:  # constants all of them but the products
                product = self._product(codes, index) * scale - (zero_point * sums) * scale
            else:
                product = (self._product(codes, index) - zero_point * sums) * scale
            y = product if y is None else y + product
        assert y is not None
        if self.bypass is not None:
            error = torch.cat(errors, dim=self.channel_dim)
            self.bypass.take(error if inverse is None else error / inverse)
        if self.bias is not None:
            y = y + self._along_channels(self.bias, y)
        return y if self.step_bias is None else y + self._bias_of_step(self.step_bias, y)

    def _product(self, codes: Tensor, index: int) -> Tensor:
        """`sum(codes * w)` of part `index`."""
        weight = self.differences[index]
        scale = self.weight_scale[index].view(-1, *(1,) * (weight.dim() - 1))
        return self._apply_weight(codes, weight.to(torch.float32) * scale)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.spec.kind == "linear":
            return F.linear(x, weight)
        spec = self.spec
        return F.conv2d(x, weight, None, spec.stride, spec.padding, spec.dilation)

    def _weight_sums(self, index: int, x: Tensor) -> Tensor:
        """`sum(w)` of part `index` over what lies in the image: `[C_out]`, `[1, C_out, H', W']`."""
        padded = self.spec.kind == "conv2d" and self.spec.padding != (0, 0)
        size = tuple(int(length) for length in x.shape[2:]) if padded else ()
        if (index, *size) not in self._sums:
            sums = self.differences[index].to(torch.float32).sum(dim=1, keepdim=True)
            if self.spec.kind == "linear":
                found = sums[:, 0] * self.weight_scale[index]
            else:
                ones = sums.new_ones(1, 1, *size) if padded else None
                found = sums.sum(dim=(1, 2, 3)) if ones is None else self._apply_weight(ones, sums)
                found = found.view(1, len(sums), *(found.shape[2:] or (1, 1)))
                found = found * self.weight_scale[index].view(1, -1, 1, 1)
            self._sums[(index, *size)] = found
        return self._sums[(index, *size)]

    def _of_step(self, table: Tensor, x: Tensor) -> Tensor:
        """Entries of `table [T]` for the samples of `x`, in its rank: `[1, ...]` or `[B, ...]`."""
        if self.steps > 1:
            table = table.index_select(0, spread_rows(self.context.rows, x.shape[0]))
        return table.view(-1, *(1,) * (x.dim() - 1))

    def _bias_of_step(self, table: Tensor, y: Tensor) -> Tensor:
        """Rows of `table [T, C_out]` for the samples of `y`, to be added to it."""
        if len(table) > 1:
            table = table.index_select(0, spread_rows(self.context.rows, y.shape[0]))
        if self.spec.kind == "linear":
            return table.view(-1, *(1,) * (y.dim() - 2), self.spec.out_channels)
        return table.view(-1, self.spec.out_channels, 1, 1)

    def _along_channels(self, values: Tensor, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        return values.view(shape)


def export_denoiser(denoiser: nn.Module, device: str = "CPU") -> tuple[nn.Module, StepContext]:
    """A copy of a packed `denoiser` that traces, and the context whose `rows` it reads.

    The copy takes the rows of a step as they stand in the context: nothing reads its timestep.
    """
    check_exportable(denoiser, device)
    quantized = [m for m in denoiser.modules() if isinstance(m, IntegerLayer | PackedAttention)]
    copied = copy_around(denoiser, [m for m in quantized if isinstance(m, IntegerLayer)])
    contexts = {
        m.context for m in copied.modules() if isinstance(m, IntegerLayer | PackedAttention)
    }
    (context,) = contexts
    for hooks in (copied._forward_pre_hooks, copied._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), StepContext):
                del hooks[key]  # type: ignore[attr-defined]

    def replacement(_: str, module: nn.Module) -> nn.Module | None:
        return ExportLayer(module) if isinstance(module, IntegerLayer) else None

    return replace_modules(copied, replacement).eval(), context


def check_exportable(denoiser: nn.Module, device: str = "CPU") -> None:
    """An error that names what OpenVINO's `device` cannot run as the packed layers do, and why."""
    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, IntegerLayer)}
    if not layers:
        raise StepQuantError(
            f"{type(denoiser).__name__} has no packed layer: expected a model that stepquant "
            "quantize wrote; the backend openvino runs no other"
        )
    if hasattr(denoiser, "_hf_hook"):
        raise StepQuantError(
            f"{type(denoiser).__name__} is offloaded by accelerate: expected one that is on the "
            "CPU as it is; the backend openvino has memory of its own"
        )
    dtype = next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), torch.float32)
    if dtype != torch.float32:
        raise StepQuantError(
            f"{type(denoiser).__name__} is in {dtype}: expected float32 for the backend openvino, "
            "whose option precision chooses what it computes in; load it in float32"
        )
    check_no_lora(denoiser)
    for name, module in denoiser.named_modules():
        if isinstance(module, PackedAttention) and bool(module.probability_log2.any()):
            steps = int(module.probability_log2.sum())
            raise StepQuantError(
                f"the attention '{name}' has probabilities on the log2 grid in {steps} of "
                f"{module.steps} rows: expected the uniform grid, which the backend openvino "
                f"computes; leave out the step adaptive_softmax, or {DEFAULT}"
            )
    for name, layer in layers.items():
        if device in ("CPU", "AUTO") and layer.spec.pair_overflows_int16 and _saturates(layer.spec):
            raise StepQuantError(
                f"the layer '{name}' has w{layer.spec.weight_bits}a{layer.spec.activation_bits} "
                "and this CPU no VNNI, so that OpenVINO's integer kernels would saturate: expected "
                f"fewer bits or a CPU with VNNI; {DEFAULT} exactly"
            )


def check_no_lora(denoiser: nn.Module) -> None:
    """An error that names a layer with a LoRA, which a compiled model would leave out."""
    for name, _, lora, _ in named_branches(denoiser):
        raise StepQuantError(
            f"the layer '{name}' has the LoRA '{lora}': expected none for the backend openvino, "
            f"which would not see its scale change; unload it, or {DEFAULT}"
        )


def traced(call: nn.Module, tensors: list[Tensor]) -> Any:
    """OpenVINO's model of `call`, for the shapes of `tensors`.

    By its frontend, not by `openvino.convert_model`, which reports each use to its makers.
    """
    from openvino import PartialShape
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: shapes and rows are part of the key
        decoder = TorchScriptPythonDecoder(call, example_input=tuple(tensors), skip_freeze=True)
    frontend = FrontEndManager().load_by_framework("pytorch")
    loaded = frontend.load(decoder)
    for place, tensor in zip(loaded.get_inputs(), tensors, strict=True):
        loaded.set_partial_shape(place, PartialShape(list(tensor.shape)))
    model = frontend.convert(loaded)
    # Ranges of FakeQuantize become constants, without which nothing runs on integers.
    apply_moc_transformations(model, cf=False)
    return model


def _saturates(spec: LayerSpec) -> bool:
    """Whether u8 by i8 kernels of this machine's CPU saturate; what is not x86 has others."""
    return ONEDNN.why_not(spec, torch.device("cpu")) is None and pairs_saturate()


def _alike(table: Tensor) -> bool:
    """Whether all rows of `table [P, T]` are alike."""
    return bool((table == table[:, :1]).all())


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()
