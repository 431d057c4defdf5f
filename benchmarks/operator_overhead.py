"""What the dispatcher of torch costs a fused pass, in microseconds per call.

    python benchmarks/operator_overhead.py

Times each fused pass on small tensors twice: called directly, as eager code on the CPU does, and
as the operator `torch.ops.stepquant.NAME`, as compiled graphs do. Then times the calls of packed
denoisers at W4A8, whose blocks run on codes on every CPU, with all passes one way and the other.
Writes `operator_overhead.json`.
"""

from __future__ import annotations

import argparse
import os
import time
import timeit
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cells import machine
from records import write_record
from stepquant.methods.recipe import parse_recipe
from stepquant.pipelines.opening import open_pipeline
from stepquant.pipelines.resolved import denoiser_of
from stepquant.runtime.ops import cpu, fused, native
from stepquant.runtime.ops.grids import Grid, Output
from stepquant.runtime.ops.native.calls import grid_structure
from stepquant.support.progress import Reporter
from stepquant.verbs.bench import denoiser_call
from stepquant.verbs.quantize import quantize

MODELS = ("builtin:fashion-ddpm", "builtin:fashion-dit")
RECIPE = {
    "name": "plain",
    "description": "Minimum and maximum, and nothing else.",
    "scheme": {"weight_bits": 4, "activation_bits": 8},
    "calibration": {"trajectories": 1, "steps": 4},
    "ranges": {"weights": "minmax", "activations": "minmax"},
    "steps": [],
}
PASSES = ("group_norm_encode", "encode", "layer_norm_encode", "gated_encode", "epilogue")


def main() -> None:
    """Time the passes, then the models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", default=None)
    parser.add_argument("--repeats", type=int, default=40, help="rounds, of which the best counts")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/operator_overhead.json")
    )
    args = parser.parse_args()
    record = {
        "machine": machine(),
        "native_level": getattr(native.library(), "level", None),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "clock": "processor time of this process, best of the rounds",
        "passes": [time_pass(*each, args.repeats) for each in passes().items()],
        "models": [time_model(name, args.repeats) for name in args.model or MODELS],
    }
    write_record(record, args.out)


def passes() -> dict[str, Callable[[], Any]]:
    """Calls of fused passes, by name and size of the input: what the smallest layers have."""
    grid = Grid(torch.tensor([0.03]), torch.tensor([20], dtype=torch.uint8), None, 255)
    if native.available():  # as layers keep it
        grid = grid._replace(structure=grid_structure(grid))
    found: dict[str, Callable[[], Any]] = {}
    for channels, size in ((64, 8), (256, 16)):
        image = torch.randn(1, channels, size, size).to(memory_format=torch.channels_last)
        found |= _of_image(image, torch.randn(channels), grid)
    return found


def _of_image(image: Tensor, channel: Tensor, grid: Grid) -> dict[str, Callable[[], Any]]:
    _, channels, height, _ = image.shape
    rows = image.permute(0, 2, 3, 1).flatten(1, 2)
    outputs = [Output(0, channels, grid, (1, 1))]
    size = f"{channels} x {height} x {height}"
    return {
        f"group_norm_encode, {size}": lambda: fused.group_norm_encode(
            (image,), None, 8, channel, channel, 1e-5, "silu", outputs
        ),
        f"encode, {size}": lambda: fused.encode(image, "silu", grid, (1, 1)),
        f"layer_norm_encode for three grids, {size}": lambda: fused.layer_norm_encode(
            rows, channel, channel, 1e-5, None, None, [grid] * 3
        ),
        f"gated_encode, {size}": lambda: fused.gated_encode(rows, "gelu", grid),
        f"epilogue, {channels}": lambda: fused.epilogue(grid, channel, channel, None, True),
    }


def as_operators() -> AbstractContextManager[Any]:
    """While this lasts, fused passes go through the dispatcher."""
    return mock.patch.object(fused, "_direct", lambda x: False)


def time_pass(name: str, call: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Microseconds of a pass, each way."""
    direct, operator = _in_turns(call, repeats, number=200)
    return {
        "name": name,
        "direct_us": direct * 1e6,
        "operator_us": operator * 1e6,
        "overhead_us": (operator - direct) * 1e6,
    }


def time_model(name: str, repeats: int) -> dict[str, Any]:
    """Milliseconds of a denoiser's call, each way, and how many passes it makes."""
    packed = quantize(open_pipeline(name), parse_recipe(RECIPE, "recipe"), reporter=Reporter())
    denoiser = denoiser_of(packed.pipeline)
    with mock.patch("stepquant.verbs.bench.recorded", lambda model: model):  # no replay
        call = denoiser_call(denoiser, 1)
    direct, operator = _in_turns(call, repeats, number=1)
    return {
        "model": name,
        "bits": packed.record["bits"],
        "passes": dict(_counted(call)),
        "direct_ms": direct * 1e3,
        "operator_ms": operator * 1e3,
        "overhead_percent": 100 * (operator / direct - 1),
    }


def _in_turns(call: Callable[[], Any], repeats: int, number: int) -> tuple[float, float]:
    """The best seconds of `call`: with direct calls, and with operators."""
    direct, operator = [], []
    for _ in range(repeats):
        direct.append(_seconds(call, number))
        with as_operators():
            operator.append(_seconds(call, number))
    return min(direct), min(operator)


def _seconds(call: Callable[[], Any], number: int) -> float:
    call()
    return timeit.timeit(call, timer=time.process_time, number=number) / number


def _counted(call: Callable[[], Any]) -> Counter[str]:
    """How often a call makes each pass."""
    count: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        own = getattr(cpu, name)

        def run(*arguments: Any) -> Any:
            count[name] += 1
            return own(*arguments)

        return run

    with mock.patch.multiple(cpu, **{name: counting(name) for name in PASSES}):
        call()
    return count


if __name__ == "__main__":
    main()
