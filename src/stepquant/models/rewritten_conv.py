"""Convolutions as one `nn.Conv2d` for each group, between operations that move values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepquant.support.errors import StepQuantError

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)

Pads = list[tuple[int, int]]


class RewrittenConv(nn.Module):
    """A convolution as one `nn.Conv2d` for each group, in `convs`.

    `kind` and `arguments` are the class and the arguments of the original layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        source = cast(Any, layer)
        self.kind = type(layer)
        self.arguments = {
            **dict(in_channels=source.in_channels, out_channels=source.out_channels),
            **dict(kernel_size=source.kernel_size, stride=source.stride, padding=source.padding),
            **dict(dilation=source.dilation, groups=source.groups, bias=source.bias is not None),
            **dict(padding_mode=source.padding_mode),
        }
        if self.transposed:
            self.arguments["output_padding"] = source.output_padding
        weights = self._conv_weights(source.weight.detach())
        biases: Iterable[Any] = [None] * len(weights)
        if source.bias is not None:
            biases = source.bias.detach().chunk(source.groups)
        self.convs = nn.ModuleList(
            self._conv(weight, bias) for weight, bias in zip(weights, biases, strict=True)
        )
        self.requires_grad_(source.weight.requires_grad)
        self.train(source.training)

    @property
    def dims(self) -> int:
        """The number of dimensions after the channels: 1, 2 or 3."""
        return len(self.arguments["kernel_size"])

    @property
    def transposed(self) -> bool:
        """Whether it stands for a transposed convolution."""
        return issubclass(self.kind, TRANSPOSED)

    @property
    def only_in_time(self) -> bool:
        """Whether it takes one pixel of several frames."""
        first, *others = self.arguments["kernel_size"]
        return self.dims == 3 and first > 1 and others == [1, 1]

    def forward(self, x: Tensor) -> Tensor:
        """The result of the layer that it stands for: `x [B, C_in, ...]` to `[B, C_out, ...]`."""
        if x.dim() == self.dims + 1:  # one sample without a batch
            return RewrittenConv.forward(self, x[None])[0]
        x = self._padded(x)
        found = []
        for conv, part in zip(self.convs, x.chunk(len(self.convs), dim=1), strict=True):
            found.append(self._after(conv(self._before(part)), part))
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def original(self) -> nn.Module:
        """The layer that it stands for, with the weights of `convs`."""
        first = cast(nn.Conv2d, self.convs[0])
        layer: Any = self.kind(
            **self.arguments, device=first.weight.device, dtype=first.weight.dtype
        )
        convs = [cast(nn.Conv2d, conv) for conv in self.convs]
        made = [self._layer_weight(conv.weight.detach()) for conv in convs]
        layer.weight.data.copy_(torch.cat(made))
        if first.bias is not None:
            biases = [self._layer_bias(cast(Tensor, conv.bias).detach()) for conv in convs]
            layer.bias.data.copy_(torch.cat(biases))
        layer.requires_grad_(first.weight.requires_grad)
        layer.train(self.training)
        return cast(nn.Module, layer)

    def __getattr__(self, name: str) -> Any:
        """The original layer's `weight`, as long as it is float, and its arguments by name."""
        arguments = self.__dict__.get("arguments", {})
        if name in arguments and name != "bias":
            return arguments[name]
        if name in ("weight", "bias") and all(type(conv) is nn.Conv2d for conv in self.convs):
            return getattr(self.original(), name)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """The class and the arguments of the layer, as `print(model)` shows them."""
        shown = {name: value for name, value in self.arguments.items() if name != "bias"}
        return f"{self.kind.__name__}: " + ", ".join(f"{k}={v}" for k, v in shown.items())

    def _pads(self) -> Pads:
        """Values before and after in each dimension."""
        padding = self.arguments["padding"]
        if padding == "valid":
            return [(0, 0)] * self.dims
        if padding == "same":
            sizes = zip(self.arguments["kernel_size"], self.arguments["dilation"], strict=True)
            return [(d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in sizes]
        return [(each, each) for each in padding]

    def _explicit(self) -> Pads:
        """The padding that is a step of its own, because the `nn.Conv2d` cannot do it."""
        pads = self._pads()
        plain = self.arguments["padding_mode"] == "zeros"
        return [
            (0, 0) if plain and low == high and not time else (low, high)
            for (low, high), time in zip(pads, self._times(), strict=True)
        ]

    def _times(self) -> list[bool]:
        return [self.dims == 3 and place == 0 for place in range(self.dims)]

    def _padded(self, x: Tensor) -> Tensor:
        pads = [each for pair in reversed(self._explicit()) for each in pair]
        if self.transposed or not any(pads):
            return x
        mode = self.arguments["padding_mode"]
        return functional.pad(x, pads, mode="constant" if mode == "zeros" else mode)

    def _before(self, x: Tensor) -> Tensor:
        """`x [B, C, ...]` of a group as the images of its `nn.Conv2d`."""
        if self.dims == 1:
            return x.unsqueeze(2)
        if self.dims == 2:
            return x
        taps, step, apart = (
            self.arguments[key][0] for key in ("kernel_size", "stride", "dilation")
        )
        count = self._frames(x.shape[2])
        shifted = [
            x[:, :, tap * apart : tap * apart + step * (count - 1) + 1 : step]
            for tap in range(taps)
        ]
        frames = shifted[0] if taps == 1 else torch.cat(shifted, dim=1)
        return frames.transpose(1, 2).flatten(0, 1)

    def _frames(self, frames: int) -> int:
        taps, step, apart = (
            self.arguments[key][0] for key in ("kernel_size", "stride", "dilation")
        )
        return (frames - apart * (taps - 1) - 1) // step + 1

    def _after(self, y: Tensor, x: Tensor) -> Tensor:
        """The result for `x [B, C, ...]` of a group, from that of its `nn.Conv2d`."""
        if self.dims == 1:
            return y.squeeze(2)
        if self.dims == 2:
            return y
        return y.unflatten(0, (x.shape[0], self._frames(x.shape[2]))).transpose(1, 2)

    def _conv_weights(self, weight: Tensor) -> list[Tensor]:
        """The weights of the groups' `nn.Conv2d`, from the layer's."""
        if self.dims == 1:
            weight = weight.unsqueeze(2)
        elif self.dims == 3:
            weight = weight.transpose(1, 2).flatten(1, 2)  # taps in time, then channels
        return list(weight.chunk(self.arguments["groups"]))

    def _layer_weight(self, weight: Tensor) -> Tensor:
        """`_conv_weights`, undone for one group."""
        if self.dims == 1:
            return weight.squeeze(2)
        if self.dims == 2:
            return weight
        return weight.unflatten(1, (self.arguments["kernel_size"][0], -1)).transpose(1, 2)

    def _layer_bias(self, bias: Tensor) -> Tensor:
        return bias

    def _conv(self, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
        stride, dilation = (
            self._of_plane(self.arguments[key], 1) for key in ("stride", "dilation")
        )
        pads, explicit = self._pads(), self._explicit()
        padding = [
            low if low != own else 0 for (low, _), (own, _) in zip(pads, explicit, strict=True)
        ]
        return _conv2d(weight, bias, stride, self._of_plane(padding, 0), dilation)

    def _of_plane(self, values: Any, missing: int) -> tuple[int, int]:
        """The last two of `values`, one for each dimension."""
        last: list[int] = [missing, *values][-2:]
        return last[0], last[1]


class RewrittenConvTranspose(RewrittenConv):
    """A transposed convolution as an `nn.Conv2d` whose channels are then laid out as pixels.

    With kernel size k and stride s, the result at `s * q + r` sums `x[q - m] * w[r + s * m]` over
    m. For each phase r, that is a convolution of k / s taps. The `nn.Conv2d` has an out-channel for
    each channel and phase, and scales of their own. The padding is cut off the result
    at the end.
    """

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """The result of the layer that it stands for.

        Raises:
            StepQuantError: `output_size` is given.
        """
        if output_size is not None:
            raise StepQuantError(
                f"a quantized {self.kind.__name__} was called with output_size={output_size!r}: "
                "expected no output_size; use output_padding, or name the layer in "
                "modules_to_not_convert"
            )
        return super().forward(x)

    def _sizes(self) -> list[tuple[int, int, int]]:
        """Kernel size, stride and taps of a phase, for height and width."""
        kernel, stride = (
            self._of_plane(self.arguments[key], 1) for key in ("kernel_size", "stride")
        )
        return [(k, s, k // s) for k, s in zip(kernel, stride, strict=True)]

    def _explicit(self) -> Pads:
        return [(0, 0)] * self.dims

    def _conv_weights(self, weight: Tensor) -> list[Tensor]:
        weight = weight.unsqueeze(2) if self.dims == 1 else weight
        (_, sh, mh), (_, sw, mw) = self._sizes()
        made = []
        for part in weight.chunk(self.arguments["groups"]):  # [C_in, C_out, mh * sh, mw * sw]
            phases = part.unflatten(3, (mw, sw)).unflatten(2, (mh, sh)).flip(2, 4)
            made.append(phases.permute(1, 3, 5, 0, 2, 4).flatten(0, 2).contiguous())
        return made

    def _layer_weight(self, weight: Tensor) -> Tensor:
        (_, sh, _), (_, sw, _) = self._sizes()
        phases = weight.unflatten(0, (-1, sh, sw)).permute(3, 0, 4, 1, 5, 2).flip(2, 4)
        whole = phases.flatten(4, 5).flatten(2, 3)
        return whole.squeeze(2) if self.dims == 1 else whole

    def _layer_bias(self, bias: Tensor) -> Tensor:
        (_, sh, _), (_, sw, _) = self._sizes()
        return bias.unflatten(0, (-1, sh * sw))[:, 0]

    def _conv(self, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
        (_, sh, mh), (_, sw, mw) = self._sizes()
        bias = None if bias is None else bias.repeat_interleave(sh * sw)
        return _conv2d(weight, bias, (1, 1), (mh - 1, mw - 1), (1, 1))

    def _after(self, y: Tensor, x: Tensor) -> Tensor:
        (kh, sh, _), (kw, sw, _) = self._sizes()
        height, width = y.shape[2:]
        y = y.unflatten(1, (-1, sh, sw)).permute(0, 1, 4, 2, 5, 3)
        y = y.reshape(y.shape[0], y.shape[1], height * sh, width * sw)
        (top, left), (more_h, more_w) = (
            self._of_plane(self.arguments[key], 0) for key in ("padding", "output_padding")
        )
        sizes = x.shape[2:] if self.dims == 2 else (1, *x.shape[2:])
        rows = (sizes[0] - 1) * sh - 2 * top + kh + more_h
        columns = (sizes[1] - 1) * sw - 2 * left + kw + more_w
        y = y[:, :, top : top + rows, left : left + columns]
        return y.squeeze(2) if self.dims == 1 else y


def _conv2d(
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> nn.Conv2d:
    """An `nn.Conv2d` that holds `weight` and `bias`."""
    with torch.device("meta"):
        out_channels, in_channels, *kernel = weight.shape
        conv = nn.Conv2d(
            *(in_channels, out_channels, (kernel[0], kernel[1]), stride, padding, dilation),
            bias=bias is not None,
        )
    conv.weight = nn.Parameter(weight)
    conv.bias = None if bias is None else nn.Parameter(bias)
    return conv
