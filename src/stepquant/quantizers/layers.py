"""Trainable simulation of quantized linear and conv layers.

A layer has one or more input *parts*. A concatenated skip input has two: it is split where the
backbone's channels end, and so is the weight. Each part has quantizers of its own (Q-Diffusion,
ICCV 2023, section 4.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepquant.numerics import check_bits
from stepquant.quantizers.activation import ActivationQuantizer, TakesErrors, spread_rows
from stepquant.quantizers.step_grid import StepContext
from stepquant.quantizers.trainable_weight import TrainableWeight
from stepquant.quantizers.weight import WeightQuantizer
from stepquant.support.errors import StepQuantError


class QuantLayer(TrainableWeight):
    """Base class of the simulated linear and conv layers.

    - `weight`, `splits`, `adapter`, `roundings`: see `TrainableWeight`.
    - `bias [C_out]`: the float layer's bias in float32, trainable, or None.
    - `inverse_channel_scale [C_in]`: factor per in-channel, applied to the input before it is
      quantized. It is all ones unless an equivalent scaling could not be folded into the producer.
    - `bypass`: receives the input error while the layer quantizes, or None.
    - `step_bias [T, C_out]`: added to the output at each step while the layer quantizes, or None.
    - `quantizing`: False runs the layer in float, with the scaling and without any rounding.
    """

    bias: nn.Parameter | None
    channel_dim: int  # of the input
    inverse_channel_scale: Tensor
    step_bias: Tensor | None
    activation_quantizers: nn.ModuleList

    def _setup(
        self,
        layer: nn.Linear | nn.Conv2d,
        weight_bits: int,
        activation_bits: int,
        context: StepContext,
        splits: tuple[int, ...] | None,
    ) -> None:
        self.weight = nn.Parameter(layer.weight.detach().to(torch.float32, copy=True))
        bias = None if layer.bias is None else layer.bias.detach().to(torch.float32, copy=True)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.out_channels, self.in_channels = self.weight.shape[:2]
        self.splits = splits or (self.in_channels,)
        if sum(self.splits) != self.in_channels:
            raise StepQuantError(
                f"input parts {self.splits} add up to {sum(self.splits)} channels: expected "
                f"{self.in_channels}"
            )
        self.context = context
        self.quantizing = False
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.activation_quantizers = nn.ModuleList(
            ActivationQuantizer(activation_bits, 1) for _ in self.splits
        )
        self.weight_quantizers = nn.ModuleList(
            WeightQuantizer(weight_bits, self.out_channels) for _ in self.splits
        )
        self.register_buffer("inverse_channel_scale", torch.ones(self.in_channels))
        self.register_buffer("step_bias", None)
        self.scales_input = False
        self.bypass: TakesErrors | None = None
        self.adapter = None
        self.roundings = ()

    def parts(self) -> Iterator[tuple[ActivationQuantizer, WeightQuantizer, Tensor]]:
        """Yield activation quantizer, weight quantizer and weight of each part.

        The weight is `[C_out, C_part, ...]`, with the adapter's change.
        """
        pairs = zip(self.activation_quantizers, self.quantized_parts(), strict=True)
        for activations, (weights, weight) in pairs:
            assert isinstance(activations, ActivationQuantizer)
            yield activations, weights, weight

    def set_activation_bits(self, bits: int) -> None:
        """Set the bits of the input to `bits`.

        The activation tables must then be initialized again.

        Raises:
            StepQuantError: `bits` is not an int from 1 to 8.
        """
        self.activation_bits = check_bits(bits, "activation bits")
        for quantizer in self.activation_quantizers:
            assert isinstance(quantizer, ActivationQuantizer)
            quantizer.bits = bits

    def set_step_bias(self, step_bias: Tensor) -> None:
        """Add `step_bias [T, C_out]` to the output, one row for each step.

        Activation tables of a single row are resized to `T` rows.
        """
        self.step_bias = step_bias
        for quantizer in self.activation_quantizers:
            assert isinstance(quantizer, ActivationQuantizer)
            if quantizer.steps == 1:
                quantizer.resize(len(step_bias))

    def optional_tensors(self) -> dict[str, Tensor]:
        """What the layer computes with besides codes and grids, by the names of a packed layer.

        See `runtime.layers.layer_tensors`.
        """
        found = {"bias": self.bias, "step_bias": self.step_bias}
        if self.scales_input:
            found["act_channel_scale"] = 1.0 / self.inverse_channel_scale
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def multiply_channel_scale(self, scale: Tensor) -> None:
        """Divide the input by `scale [C_in]` from now on, in addition to any earlier scaling."""
        # The packed layer stores the float32 scale and inverts it. Inverting the same float32
        # number here gives the same bits.
        self.inverse_channel_scale.copy_(1.0 / (scale / self.inverse_channel_scale))
        self._notice_channel_scale()

    def _notice_channel_scale(self) -> None:
        self.scales_input = bool((self.inverse_channel_scale != 1).any())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._notice_channel_scale()

    def scaled_input(self, x: Tensor) -> Tensor:
        """Return `x` after the per-in-channel scaling that was not folded."""
        return x * self._over_positions(self.inverse_channel_scale, x) if self.scales_input else x

    def unscaled_input(self, x: Tensor) -> Tensor:
        """Undo `scaled_input`."""
        return x / self._over_positions(self.inverse_channel_scale, x) if self.scales_input else x

    def input_parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the scaled input, split into one tensor for each activation quantizer."""
        return self.scaled_input(x).split(self.splits, dim=self.channel_dim)

    def input_error(self, x: Tensor) -> Tensor:
        """Return the quantization error of the input `x`, float32, in the shape of `x`.

        The error is `x` minus its quantized value, in the units of `x` before the scaling.
        """
        errors = []
        for quantizer, part in zip(self.activation_quantizers, self.input_parts(x), strict=True):
            assert isinstance(quantizer, ActivationQuantizer)
            rows = quantizer.table_rows(self.context.rows, x.shape[0])
            scale = quantizer.scale[rows].view(-1, *(1,) * (x.dim() - 1))
            errors.append(part - quantizer.differences(part, rows) * scale)
        return self.unscaled_input(torch.cat(errors, dim=self.channel_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer; while `quantizing`, with quantized input and weight.

        Without gradients, a quantizing layer computes as the integer runtime does.

        Raises:
            StepQuantError: the leading dimension of `x` is not a multiple of the number of
                timesteps.
        """
        if not self.quantizing:
            return self._compute(self.scaled_input(x), self.merged_weight(), self.bias)
        if self.bypass is not None:
            with torch.no_grad():
                self.bypass.take(self.input_error(x))
        if not torch.is_grad_enabled():
            return self._compute_integers(x)
        pairs = zip(self.activation_quantizers, self.input_parts(x), strict=True)
        parts = [quantizer(part, self.context.rows) for quantizer, part in pairs]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.channel_dim)
        y = self._compute(x, self.quantized_weight(), self.bias)
        if self.step_bias is None:
            return y
        return y + self._over_positions(self.step_bias[spread_rows(self.context.rows, len(y))], y)

    def _over_positions(self, values: Tensor, x: Tensor) -> Tensor:
        """Reshape `values [C]` or `[R, C]` to broadcast over `x`, an input or output."""
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        if values.dim() == 2:
            shape[0] = len(values)
        return values.view(shape)

    def _whole_bias(self, batch: int) -> Tensor | None:
        """Return `bias` plus the step bias of the current rows, `[C_out]` or `[R, C_out]`."""
        if self.step_bias is None:
            return self.bias
        rows = self.step_bias[spread_rows(self.context.rows, batch)]
        return rows if self.bias is None else self.bias + rows

    def _compute_integers(self, x: Tensor) -> Tensor:
        """Compute `forward` as the runtime does: sum whole numbers first, then apply the scales.

        The result is bit-equal to the reference kernels while sums stay below 2^24. A sum of scaled
        numbers rounds differently, and each difference can move a value of the next layer to
        another code.
        """
        y: Tensor | None = None
        for (inputs, weights, weight), part in zip(self.parts(), self.input_parts(x), strict=True):
            rows = inputs.table_rows(self.context.rows, x.shape[0])
            total = self._compute(inputs.differences(part, rows), weights.differences(weight), None)
            scale = inputs.scale[rows].view(-1, *(1,) * (total.dim() - 1))
            part_y = total * (scale * self._over_positions(weights.scale, total))
            if y is not None:
                y = part_y + y
            else:
                bias = self._whole_bias(x.shape[0])
                y = part_y if bias is None else part_y + self._over_positions(bias, part_y)
        assert y is not None
        return y

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class QuantLinear(QuantLayer):
    """Simulated quantized `nn.Linear`: `[B, ..., C_in]` to `[B, ..., C_out]`.

    `splits` holds the in-channels of each input part; None means one part.

    Raises:
        StepQuantError: bits are not ints from 1 to 8, or `splits` do not add up to `C_in`.
    """

    channel_dim = -1

    def __init__(
        self,
        layer: nn.Linear,
        weight_bits: int,
        activation_bits: int,
        context: StepContext,
        splits: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self._setup(layer, weight_bits, activation_bits, context, splits)
        # Named as in `nn.Linear`: diffusers pipelines read a layer's sizes from these attributes.
        self.in_features, self.out_features = self.in_channels, self.out_channels

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)


class QuantConv2d(QuantLayer):
    """Simulated quantized `nn.Conv2d` with zero padding and one group; inputs `[B, C_in, H, W]`.

    `splits` holds the in-channels of each input part; None means one part.

    Raises:
        StepQuantError: bits are not ints from 1 to 8, or `splits` do not add up to `C_in`.
    """

    channel_dim = 1

    def __init__(
        self,
        layer: nn.Conv2d,
        weight_bits: int,
        activation_bits: int,
        context: StepContext,
        splits: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        assert not isinstance(layer.padding, str)
        self.stride, self.padding, self.dilation = (
            (pair[0], pair[1]) for pair in (layer.stride, layer.padding, layer.dilation)
        )
        self._setup(layer, weight_bits, activation_bits, context, splits)

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)
