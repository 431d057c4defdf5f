"""Size of mixed-bit checkpoints of the published CIFAR-10 DDPM architecture, layer by layer.

    python benchmarks/mixed_bits_size.py

Packs it (35.7 M parameters, random weights) at 2 and 3 mean bits with MPQ-DM's steps that take
room: scaled inputs, step tables of 100 rows, bits that differ between out-channels. Writes
`mixed_bits_size.json`: bytes of the file against float32, mean bits and bytes of each layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cells import machine
from paper_model import paper_pipeline
from records import write_record
from stepquant.methods.recipe import parse_recipe
from stepquant.pipelines.resolved import denoiser_of
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.support.progress import Reporter
from stepquant.verbs.quantize import quantize

RECIPE = {
    "name": "mixed",
    "description": "everything of MPQ-DM that takes room; random weights have no outliers to rank",
    "calibration": {"trajectories": 1, "steps": 100},
    "ranges": {"weights": "minmax", "activations": "minmax"},
    "steps": [
        "smoothing",
        "temporal_quantizer",
        {"outlier_mixed_bits": {"selection": "error", "samples": 1}},
    ],
}


def layer_row(name: str, layer: IntegerLayer) -> dict[str, Any]:
    """Mean bits of the weights, and the bytes of all that the checkpoint has of the layer."""
    weights = layer.spec.out_channels * layer.spec.columns
    return {
        "layer": name,
        "weights": weights,
        "channel_counts": layer.spec.channel_counts,
        "mean_bits": layer.spec.mean_weight_bits,
        "weight_bytes": layer.weight_packed.numel(),
        "all_bytes": sum(tensor.nbytes for tensor in layer.state_dict().values()),
    }


def main() -> None:
    """Pack and weigh."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mixed_bits_size.json"))
    args = parser.parse_args()
    pipeline = paper_pipeline()
    parameters = sum(p.numel() for p in denoiser_of(pipeline).parameters())
    record: dict[str, Any] = {"parameters": parameters, "machine": machine(), "sizes": {}}
    for bits in (2, 3):
        plain = {**RECIPE, "scheme": {"weight_bits": bits, "activation_bits": 4}}
        with TemporaryDirectory() as scratch, torch.no_grad():
            result = quantize(
                pipeline,
                parse_recipe(plain, "recipe"),
                out=Path(scratch) / "packed",
                reporter=Reporter(),
            )
        keys = ("float32_bytes", "checkpoint_bytes", "times_smaller", "mean_weight_bits")
        record["sizes"][result.record["bits"]] = {
            **{key: result.record[key] for key in keys},
            "layers": [
                layer_row(name, module)
                for name, module in denoiser_of(result.pipeline).named_modules()
                if isinstance(module, IntegerLayer)
            ],
        }
        print({key: result.record[key] for key in keys})
    write_record(record, args.out)


if __name__ == "__main__":
    main()
