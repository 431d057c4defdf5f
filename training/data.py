"""Image sets for training and judging the embedded models, as uint8 tensors `[N, C, 32, 32]`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

# In label order, 0 to 9.
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
FASHION_CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle-boot"),
)


def load_fashion_mnist(folder: Path) -> dict[str, torch.Tensor]:
    """Fashion-MNIST from `fashion_mnist_uint8.npz`, padded from 28x28 to 32x32 with black.

    Returns `x_train [60000, 1, 32, 32]`, `y_train`, `x_test [10000, 1, 32, 32]`, `y_test`
    (images uint8, labels int64). The archive is sorted by label: shuffle when drawing batches.
    """
    with np.load(folder / "fashion_mnist_uint8.npz") as archive:
        data = {name: torch.from_numpy(archive[name]) for name in archive.files}
    for split in ("x_train", "x_test"):
        data[split] = torch.nn.functional.pad(data[split][:, None], (2, 2, 2, 2))
    for split in ("y_train", "y_test"):
        data[split] = data[split].long()
    return data


def load_cifar10(folder: Path) -> dict[str, torch.Tensor]:
    """CIFAR-10 from webp mosaics of 50 x 50 tiles.

    Returns `x_train [50000, 3, 32, 32]`, `y_train`, `x_test [10000, 3, 32, 32]`, `y_test`
    (images uint8, labels int64).
    """
    data = {}
    for split in ("train", "test"):
        tiles = []
        for path in sorted(folder.glob(f"{split}_*.webp")):
            with Image.open(path) as mosaic:
                pixels = np.asarray(mosaic.convert("RGB"))
            grid = pixels.reshape(50, 32, 50, 32, 3).transpose(0, 2, 1, 3, 4)
            tiles.append(grid.reshape(-1, 32, 32, 3))
        images = torch.from_numpy(np.concatenate(tiles)).permute(0, 3, 1, 2).contiguous()
        data[f"x_{split}"] = images
        data[f"y_{split}"] = torch.from_numpy(np.load(folder / f"{split}_labels.npy")).long()
    return data


LOADERS = {
    "fashion_mnist": (load_fashion_mnist, FASHION_CLASSES),
    "cifar10": (load_cifar10, CIFAR10_CLASSES),
}


def load(name: str, data_folder: Path) -> dict[str, torch.Tensor]:
    """The image set `name` from its folder below `data_folder`."""
    if name not in LOADERS:
        raise SystemExit(f"unknown data set '{name}': expected one of {', '.join(LOADERS)}")
    loader, _ = LOADERS[name]
    return loader(data_folder / name)


def scaled(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as the networks take them, float in [-1, 1]."""
    return images.float() / 127.5 - 1
