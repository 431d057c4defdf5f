"""A packed denoiser as one module of operators that OpenVINO runs on integers.

A packed layer computes `s * (sum(q * w) - z * sum(w)) + bias` from codes `q`, with the step's scale
`s` and zero point `z`. The export computes `round(x / s) + z` itself and applies a FakeQuantize
with the constant range 0..2^bits - 1 and step 1, which only clamps. The codes are therefore exactly
those of the packed layer. Weights are int8 differences times a scale, so OpenVINO's low precision
transformations turn the product into a convolution or matmul of u8 by i8 with int32 sums. These
transformations need constant ranges. `s` and `z` stay outside of them, so one compiled model serves
all steps.

The zero point's share `z * sum(w)` is subtracted from the sum. Zero padding has the code zero here,
not `z`, so at borders `sum(w)` covers only the weights inside the image.
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
from stepquant.runtime.layers.adapters import adapters_text, named_adapters
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.integer_attention import PackedAttention
from stepquant.runtime.layers.layer_tensors import Reader, not_read
from stepquant.runtime.layers.lora_branch import named_branches
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.support.errors import StepQuantError

DEFAULT = "draw with the default backend, which runs it"


class ExportLayer(nn.Module):
    """The computation of an `IntegerLayer` in float32, on integer values.

    Run a forward without tracing first: it computes the constants for the input's shape, which the
    traced forward then uses.
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
        """Return the packed layer's output for `x` in float32."""
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
            if self.steps == 1:  # everything but the products is constant
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
        """Return `sum(codes * w)` of input part `index`."""
        weight = self.differences[index]
        scale = self.weight_scale[index].view(-1, *(1,) * (weight.dim() - 1))
        return self._apply_weight(codes, weight.to(torch.float32) * scale)

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.spec.kind == "linear":
            return F.linear(x, weight)
        spec = self.spec
        return F.conv2d(x, weight, None, spec.stride, spec.padding, spec.dilation)

    def _weight_sums(self, index: int, x: Tensor) -> Tensor:
        """Return `sum(w)` of input part `index` over the weights inside the image.

        The shape is `[C_out]` for linear layers and `[1, C_out, H', W']` for convolutions.
        """
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
        """Return the entries of `table [T]` for the samples of `x`, `[1, ...]` or `[B, ...]`.

        The result has as many dimensions as `x`.
        """
        if self.steps > 1:
            table = table.index_select(0, spread_rows(self.context.rows, x.shape[0]))
        return table.view(-1, *(1,) * (x.dim() - 1))

    def _bias_of_step(self, table: Tensor, y: Tensor) -> Tensor:
        """Return the rows of `table [T, C_out]` for the samples of `y`, in a shape to add to it."""
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
    """Return a traceable copy of a packed `denoiser`, and the context whose `rows` it reads.

    The copy does not derive rows from its timestep: the caller sets them in the context.

    Raises:
        StepQuantError: see `check_exportable`.
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
    """Check that OpenVINO's `device` can run `denoiser` like its packed layers.

    Raises:
        StepQuantError: it has no packed layer, is offloaded or not in float32, has a LoRA or log2
            attention probabilities, or its integer sums would saturate on this CPU.
    """
    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, IntegerLayer)}
    if not layers:
        raise StepQuantError(
            f"{type(denoiser).__name__} has no packed layer: expected a model that stepquant "
            "quantize wrote; the backend openvino runs no other"
        )
    if hasattr(denoiser, "_hf_hook"):
        raise StepQuantError(
            f"{type(denoiser).__name__} is offloaded by accelerate: expected it on the CPU, "
            "because the backend openvino manages its own memory; load it without offloading"
        )
    dtype = next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), torch.float32)
    if dtype != torch.float32:
        raise StepQuantError(
            f"{type(denoiser).__name__} is in {dtype}: expected float32, because the option "
            "precision of the backend openvino sets the arithmetic; load it in float32"
        )
    check_no_lora_branch(denoiser)
    for name, module in denoiser.named_modules():
        if isinstance(module, PackedAttention) and bool(module.probability_log2.any()):
            steps = int(module.probability_log2.sum())
            raise StepQuantError(
                f"the attention '{name}' has probabilities on the log2 grid in {steps} of "
                f"{module.steps} rows: expected the uniform grid, which the backend openvino "
                f"computes; leave out the step adaptive_softmax, or {DEFAULT}"
            )
    for name, layer in layers.items():
        unread = not_read(layer.present(), Reader.OPENVINO)
        if unread:
            raise StepQuantError(
                f"the layer '{name}' has the tensor '{unread[0]}': expected a layer without it for "
                f"the backend openvino, which does not compute with it; {DEFAULT}"
            )
        if device in ("CPU", "AUTO") and layer.spec.pair_overflows_int16 and _saturates(layer.spec):
            raise StepQuantError(
                f"the layer '{name}' is w{layer.spec.weight_bits}a{layer.spec.activation_bits} and "
                "this CPU has no VNNI, so OpenVINO's integer kernels would saturate: expected "
                f"fewer bits or a CPU with VNNI; {DEFAULT} exactly"
            )


def check_no_lora_branch(denoiser: nn.Module) -> None:
    """Check that no layer has a LoRA branch, or an adapter of peft.

    Raises:
        StepQuantError: a layer has one; a compiled model would ignore changes of its scale.
    """
    for name, _, lora, _ in named_branches(denoiser):
        raise StepQuantError(
            f"the layer '{name}' has the LoRA '{lora}': expected none for the backend openvino, "
            f"which would not see its scale change; unload it, or {DEFAULT}"
        )
    for name, adapters in named_adapters(denoiser):
        raise StepQuantError(
            f"the layer '{name}' has {adapters_text(adapters)} of peft: expected none for the "
            f"backend openvino, which would not see them change; call unload_lora_weights, or "
            f"{DEFAULT}"
        )


def traced(call: nn.Module, tensors: list[Tensor]) -> Any:
    """Return OpenVINO's model of `call` for the shapes of `tensors`.

    This uses OpenVINO's frontend directly, because `openvino.convert_model` sends telemetry.
    """
    from openvino import PartialShape
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracer warnings: constants depend on the cache key only
        decoder = TorchScriptPythonDecoder(call, example_input=tuple(tensors), skip_freeze=True)
    frontend = FrontEndManager().load_by_framework("pytorch")
    loaded = frontend.load(decoder)
    for place, tensor in zip(loaded.get_inputs(), tensors, strict=True):
        loaded.set_partial_shape(place, PartialShape(list(tensor.shape)))
    model = frontend.convert(loaded)
    # Integer kernels need FakeQuantize ranges that are constants; this folds them.
    apply_moc_transformations(model, cf=False)
    return model


def _saturates(spec: LayerSpec) -> bool:
    """Whether u8 by i8 kernels saturate on this CPU, which only x86 CPUs without VNNI do."""
    return ONEDNN.why_not(spec, torch.device("cpu")) is None and pairs_saturate()


def _alike(table: Tensor) -> bool:
    """Whether `table [P, T]` has equal values at all steps."""
    return bool((table == table[:, :1]).all())


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()
