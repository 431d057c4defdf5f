"""How far a Fréchet distance over our features moves, for changes seen and unseen by people.

    python benchmarks/feature_sensitivity.py --data DIR

Changes test images in one way at a time and measures the distance to the training set. A useful
distance hardly moves for what nobody sees (a brightness three of 255 grey levels off), and grows
with noise, blur and missing classes. Writes `feature_sensitivity.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from cells import machine
from records import write_record
from stepquant.evaluation import frechet_distance, load_features
from stepquant.evaluation.features import ASSETS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training"))
from data import load


def noisy(deviation: float) -> Callable[[Tensor], Tensor]:
    """Gaussian noise."""

    def change(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return (x + deviation * torch.randn(x.shape, generator=generator)).clamp(0, 1)

    return change


def blurred(x: Tensor, size: int) -> Tensor:
    """The mean over a box of `size` pixels, of those that lie in the image."""
    return functional.avg_pool2d(x, size, 1, size // 2, count_include_pad=False)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    **{f"brighter by {v}": lambda x, v=v: (x + v).clamp(0, 1) for v in (0.01, 0.03)},
    **{f"darker by {v}": lambda x, v=v: (x - v).clamp(0, 1) for v in (0.01, 0.03)},
    **{f"noise of deviation {v}": noisy(v) for v in (0.02, 0.05, 0.1, 0.2)},
    **{f"box blur {k} x {k}": lambda x, k=k: blurred(x, k) for k in (3, 5)},
    **{
        f"rounded to {b} bits": lambda x, b=b: (x * (2**b - 1)).round() / (2**b - 1)
        for b in (4, 3, 2)
    },
}


def main() -> None:
    """Measure all changes for one feature network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", default="fashion", help="a shipped name or a folder")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the image sets")
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/feature_sensitivity.json")
    )
    args = parser.parse_args()
    features = load_features(args.features)
    assert features.reference is not None
    shipped = ASSETS / f"{args.features}-features"
    folder = shipped if shipped.is_dir() else Path(args.features)
    data = load(json.loads((folder / "config.json").read_text())["data"], args.data)
    pick = torch.randperm(len(data["x_test"]), generator=torch.Generator().manual_seed(0))
    pick = pick[: args.num]
    images, labels = data["x_test"][pick].float() / 255, data["y_test"][pick]
    sets = {name: change(images) for name, change in CHANGES.items()}
    sets["one class of ten missing"] = images[labels != 3]
    distances = {
        name: frechet_distance(features(changed), features.reference)
        for name, changed in sets.items()
    }
    for name, distance in distances.items():
        print(f"{name:<28} {distance:8.4f}")
    record = {
        "distance": f"fd_{features.name}",
        "num": args.num,
        "machine": machine(),
        "distances": distances,
    }
    write_record(record, args.out)


if __name__ == "__main__":
    main()
