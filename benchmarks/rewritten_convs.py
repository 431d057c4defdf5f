"""Convolutions that are rewritten for the integer kernels: their speed beside the float layers.

    python benchmarks/rewritten_convs.py

One thread; a call's time is the least processor time of many, in turns: the float layer, the
rewritten layer in float, and the rewritten layer at W8A8. Writes `rewritten_convs.json`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cells import machine
from records import write_record
from stepquant.models.rewriting import class_for
from stepquant.quantizers import QuantConv2d, StepContext, StepGrid
from stepquant.quantizers.weight import minmax_weight_range
from stepquant.runtime.ops import native
from stepquant.simulation.packing import pack_layer

RESULTS = Path("benchmarks/results")
CASES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.ConvTranspose2d(128, 128, 4, 2, 1), (1, 128, 16, 16)),
    (nn.ConvTranspose2d(256, 128, 2, 2), (1, 256, 16, 16)),
    (nn.Conv2d(256, 256, 3, padding=1, padding_mode="circular"), (1, 256, 16, 16)),
    (nn.Conv2d(256, 256, 3, padding=1, groups=4), (1, 256, 16, 16)),
    (nn.Conv1d(256, 256, 3, padding=1), (1, 256, 256)),
    (nn.Conv3d(128, 128, 3, padding=1), (1, 128, 8, 16, 16)),
    (nn.Conv3d(320, 320, (3, 1, 1), padding=(1, 0, 0)), (1, 320, 8, 16, 16)),
]


def packed(conv: nn.Conv2d) -> nn.Module:
    """`conv` at W8A8, with a grid for standard normal inputs."""
    layer = QuantConv2d(conv, 8, 8, StepContext(StepGrid(torch.arange(1))))
    layer.fit_weights(minmax_weight_range)
    grid: Any = layer.activation_quantizers[0]
    grid.scale.data.fill_(0.03)
    grid.zero_point.data.fill_(128)
    layer.quantizing = True
    return pack_layer(layer)


@torch.no_grad()
def measure(layer: nn.Module, shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """One row."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    kind = class_for(layer)
    assert kind is not None
    ways: dict[str, Any] = {"float": layer, "rewritten_float": kind(layer), "w8a8": kind(layer)}
    convs: Any = ways["w8a8"].convs
    for number, conv in enumerate(convs):
        convs[number] = packed(conv)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, module in ways.items():
            best[name] = min(best[name], seconds(module, x))
    return {
        "layer": str(layer),
        "input": list(shape),
        **{f"{name}_ms": 1e3 * value for name, value in best.items()},
        "times_float": best["float"] / best["w8a8"],
    }


def seconds(module: nn.Module, x: Tensor) -> float:
    """Processor time of a call."""
    started = time.process_time()
    module(x)
    return time.process_time() - started


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    library = native.library()
    rows = []
    for layer, shape in CASES:
        rows.append(measure(layer.eval(), shape, args.repeats))
        print(f"{rows[-1]['times_float']:.2f} times float: {layer}")
    record = {
        "machine": machine(),
        "products": None if library is None else library.product_level,
        "seed": 0,
        "repeats": args.repeats,
        "rows": rows,
    }
    write_record(record, args.out / "rewritten_convs.json")


if __name__ == "__main__":
    main()
