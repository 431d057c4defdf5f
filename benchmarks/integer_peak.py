"""How much arithmetic a denoiser call is, and how much of it the machine's int8 kernels can do."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stepquant.evaluation import measure_latency
from stepquant.runtime.kernels import Kernel
from stepquant.runtime.kernels.native import NATIVE
from stepquant.runtime.kernels.onednn import ONEDNN
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.result_shapes import shape_of

# Large enough that everything besides the products is small: 10 to 20 G multiply-adds.
PEAK_SHAPES = {
    "conv 3x3, 256 to 256 channels, 4 x 64 x 64": (4, 256, 64),
    "linear, 1024 to 4096, 4096 rows": (4096, 1024, 4096),
}
SMALL_PEAK_SHAPES = {
    "conv 3x3, 64 to 64 channels, 1 x 32 x 32": (1, 64, 32),
    "linear, 256 to 256, 256 rows": (256, 256, 256),
}


def layer_macs(module: nn.Linear | nn.Conv2d, y: Tensor) -> int:
    """Multiply-adds of one call of a layer that gave `y`, without the bias."""
    if isinstance(module, nn.Linear):
        return y.numel() * module.in_features
    kh, kw = module.kernel_size
    return y.numel() * (module.in_channels // module.groups) * kh * kw


def count_macs(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Multiply-adds of all `nn.Conv2d` and all `nn.Linear` while `run` calls `model`.

    Attention's own products are not among them: the packed runtime leaves those float.
    """
    counts = {"conv2d": 0, "linear": 0}

    def hook(module: nn.Module, args: object, y: Tensor) -> None:
        del args
        kind = "linear" if isinstance(module, nn.Linear) else "conv2d"
        counts[kind] += layer_macs(module, y)

    handles = [
        module.register_forward_hook(hook)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return counts


def integer_peak(small: bool = False, repeats: int = 10) -> dict[str, float]:
    """G multiply-adds a second of our own kernel and of oneDNN's on codes, by shape, and the best.

    The kernel alone: no quantizing of inputs, no zero point, no padding, float32 out. Without VNNI
    oneDNN's kernel runs twice, which is in the figure, and there is none of our own.
    """
    calls, macs = {}, {}
    for kernel, title in ((NATIVE, "own"), (ONEDNN, "oneDNN")):
        for shape_name, shape in (SMALL_PEAK_SHAPES if small else PEAK_SHAPES).items():
            name = f"{title}, {shape_name}"
            spec, *tensors = (_conv if shape_name.startswith("conv") else _linear)(*shape)
            if kernel.why_not(spec, torch.device("cpu")) is None:
                calls[name], macs[name] = _call(kernel, spec, *tensors), _macs(spec, tensors[1])
    timings = measure_latency(calls, repeats, leads=1)
    found = {name: macs[name] / timing.median_ms / 1e6 for name, timing in timings.items()}
    return {**found, "best": max(found.values())}


def _conv(batch: int, channels: int, size: int) -> tuple[LayerSpec, Tensor, Tensor]:
    spec = LayerSpec("conv2d", channels, channels, 8, 8, (3, 3), (1, 1), (0, 0), (1, 1))
    codes = _codes(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
    return spec, _weight(channels, channels, 3, 3), codes


def _linear(rows: int, columns: int, out: int) -> tuple[LayerSpec, Tensor, Tensor]:
    return LayerSpec("linear", columns, out, 8, 8), _weight(out, columns), _codes(rows, columns)


def _macs(spec: LayerSpec, codes: Tensor) -> int:
    return math.prod(shape_of(codes, spec).sizes) * spec.columns


def _call(kernel: Kernel, spec: LayerSpec, weight: Tensor, codes: Tensor) -> Callable[[], object]:
    state = kernel.prepare(weight, torch.ones(spec.out_channels), spec)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    return lambda: kernel.run(state, codes, one, zero, None, None, spec)


def _weight(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-127, 128, shape, generator=generator).to(torch.int8)


def _codes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
