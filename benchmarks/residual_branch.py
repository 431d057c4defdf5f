"""One bit more for an out-channel: a finer grid, or a binary branch on top of the coarse one?

    python benchmarks/residual_branch.py

MPQ-DMv2 (arXiv 2507.04290) gives salient channels a residual of two levels beside their N-bit
weights; MPQ-DM gives them N + 1 bits. Both store as many bits; the residual's levels need not be
evenly spaced. Compares the error that each leaves in the weights of a float model, at its best
scales for each out-channel, for all channels and for the tenth with the largest kurtosis. Writes
`residual_branch.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

from cells import machine
from records import write_record
from stepquant.calibration.ranges import SHRINK_FEW_BITS, search_few_levels
from stepquant.methods.outlier_mixed_bits import kurtosis
from stepquant.numerics import fake_quantize
from stepquant.pipelines.opening import open_pipeline
from stepquant.pipelines.resolved import denoiser_of

RATIOS = torch.linspace(0.15, 0.6, 10)  # of the residual's scale to the coarse one
SHIFTS = torch.linspace(-1.0, 1.0, 9).tolist()  # quarters of the coarse grid's steps


def finer_grid_error(weight: Tensor, bits: int) -> Tensor:
    """Mean squared error of `bits + 1` bits for each row of `weight [C_out, K]`."""
    scale, zero_point = search_few_levels(weight, bits + 1, power=2.0)
    approximation = fake_quantize(
        weight, scale[:, None], zero_point[:, None], bits + 1, halves=True
    )
    return (weight - approximation).square().mean(dim=1)


def residual_error(weight: Tensor, bits: int) -> Tensor:
    """The same of a `bits`-bit grid and a residual `-r` or `r`, the nearest sum taken.

    This is the best that such a branch can do: both are chosen together, not one after the other.
    """
    coarse = torch.arange(2**bits) - (2**bits - 1) / 2
    grids = [
        torch.cat([coarse + shift - ratio, coarse + shift + ratio]).sort().values
        for shift, ratio in itertools.product(SHIFTS, RATIOS)
    ]
    best = torch.full((len(weight),), torch.inf)
    bound = weight.abs().amax(dim=1, keepdim=True)
    for factor in SHRINK_FEW_BITS:
        scale = factor * bound / coarse[-1]
        scaled = (weight / scale).contiguous()
        for levels in grids:
            middles = (levels[1:] + levels[:-1]) / 2
            error = scaled - levels[torch.bucketize(scaled, middles)]
            best = torch.minimum(best, (error * scale).square().mean(dim=1))
    return best


def compare(weights: list[Tensor], bits: int) -> dict[str, float]:
    """Relative errors of both, over all rows and over the most salient tenth of each weight."""
    sums = {"finer grid": [0.0, 0.0], "residual branch": [0.0, 0.0]}
    power = [0.0, 0.0]
    for weight in weights:
        salient = torch.argsort(kurtosis(weight), descending=True)[: max(1, len(weight) // 10)]
        found = {
            "finer grid": finer_grid_error(weight, bits),
            "residual branch": residual_error(weight, bits),
        }
        size = weight.square().mean(dim=1)
        for index, rows in enumerate((slice(None), salient)):
            power[index] += float(size[rows].sum())
            for name, error in found.items():
                sums[name][index] += float(error[rows].sum())
    return {
        f"{name}, {which}": sums[name][index] / power[index]
        for name in sums
        for index, which in enumerate(("all channels", "salient tenth"))
    }


def main() -> None:
    """Compare at one and two bits before the one more."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/residual_branch.json"))
    args = parser.parse_args()
    denoiser = denoiser_of(open_pipeline(args.model))
    weights = [
        module.weight.detach().flatten(1)
        for module in denoiser.modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and module.weight.shape[0] >= 10
    ]
    record = {
        "model": args.model,
        "layers": len(weights),
        "relative_error": {f"{bits} + 1 bits": compare(weights, bits) for bits in (2, 3)},
        "machine": machine(),
    }
    write_record(record, args.out)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
