"""Writing of sampled images as PNG files: one grid of many, or a folder of single ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stepquant.evaluation.features import check_unit_range
from stepquant.support.atomic import atomic_folder, atomic_write, user_path
from stepquant.support.errors import StepQuantError

GAP = 2  # pixels between images, after scaling
LABEL_SIZE = 14  # points
LABEL_MARGIN = 8  # pixels left and right of the labels


def check_picture_path(path: str | Path) -> Path:
    """Return `path` if a PNG can be written there; call it before the work that makes the picture.

    Raises:
        StepQuantError: the name does not end in .png, `path` is a folder, or its folder does not
            exist.
    """
    path = user_path(path)
    if path.suffix.lower() != ".png":
        raise StepQuantError(
            f"the picture '{path}' cannot be written: expected a name that ends in .png"
        )
    if path.is_dir():
        raise StepQuantError(f"the picture '{path}' is a folder: expected the name of a file")
    if not path.parent.is_dir():
        raise StepQuantError(
            f"the picture '{path}' cannot be written: expected its folder '{path.parent}' to exist"
        )
    return path


def save_grid(
    rows: Sequence[Tensor] | Tensor,
    path: str | Path,
    columns: int,
    labels: Sequence[str] | None = None,
    scale: int = 2,
) -> Path:
    """Write one PNG with many images and return its path.

    An existing file is replaced. The write is atomic: after a failure the path holds the file as it
    was before.

    Args:
        rows: images `[N, C, H, W]`, laid out from left to right and wrapped after `columns` images;
            or a list of such tensors, each of which fills one row with its first `columns` images,
            for example float above quantized. C is 1 (grey) or 3 (RGB). Values are floating point
            in [0, 1] or uint8.
        path: a name that ends in .png, in an existing folder.
        columns: number of images in each row.
        labels: one text for each row, drawn at its left.
        scale: width and height of each image pixel, in pixels of the PNG.

    Raises:
        StepQuantError: a shape, value, count or the path is not as described.
    """
    path = check_picture_path(path)
    if columns < 1 or scale < 1:
        raise StepQuantError(
            f"the grid has {columns} columns at scale {scale}: expected at least 1 of both"
        )
    strips = list(rows.split(columns)) if isinstance(rows, Tensor) else list(rows)
    strips = [to_bytes(strip[:columns]) for strip in strips]
    shapes = sorted({tuple(strip.shape[1:]) for strip in strips})
    if len(shapes) != 1:
        raise StepQuantError(
            f"the grid's rows hold images of the shapes {shapes}: expected one shape in all of "
            "them, and at least one row"
        )
    if labels is not None and len(labels) != len(strips):
        raise StepQuantError(
            f"the grid has {len(strips)} rows and {len(labels)} labels: expected one for each row"
        )
    canvas = _drawn(strips, columns, list(labels or []), scale)
    atomic_write(path, lambda partial: canvas.save(partial, format="PNG"))
    return path


def save_images(images: Tensor, folder: str | Path) -> list[Path]:
    """Write `images [N, C, H, W]` to the new folder `folder` as 00000.png, 00001.png, ...

    Values are floating point in [0, 1] or uint8; C is 1 (grey) or 3 (RGB). The write is atomic: the
    folder is complete or absent. Returns the paths in order.

    Raises:
        StepQuantError: the folder exists or cannot be written, or a shape or value is not as
            described.
    """
    whole = to_bytes(images)
    names = [f"{index:05d}.png" for index in range(len(whole))]
    with atomic_folder(Path(folder)) as partial:
        for name, image in zip(names, whole, strict=True):
            Image.fromarray(_pixels(image)).save(partial / name, format="PNG")
    return [user_path(folder) / name for name in names]


def to_bytes(images: Tensor) -> Tensor:
    """Return `images [N, C, H, W]`, floating point in [0, 1] or uint8, as uint8 on the CPU.

    Floating-point values are scaled to 255 and rounded.

    Raises:
        StepQuantError: the shape or a value is not as described.
    """
    shape = list(images.shape)
    if images.dim() != 4 or 0 in shape or shape[1] not in (1, 3):
        raise StepQuantError(
            f"images have shape {shape}: expected [N, C, H, W] with C of 1 (grey) or 3 (RGB)"
        )
    if images.dtype == torch.uint8:
        return images.cpu()
    check_unit_range(images, "images")
    return (images.detach().cpu().float() * 255).round().to(torch.uint8)


def _pixels(image: Tensor) -> np.ndarray:
    """Return an image `[C, H, W]` in Pillow's layout, `[H, W]` or `[H, W, 3]`."""
    return (image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)).contiguous().numpy()


def _drawn(strips: list[Tensor], columns: int, labels: list[str], scale: int) -> Image.Image:
    channels, height, width = strips[0].shape[1:]
    height, width = height * scale, width * scale
    columns = min(columns, max(len(strip) for strip in strips))
    font = ImageFont.load_default(LABEL_SIZE)
    left = GAP
    if labels:
        left += 2 * LABEL_MARGIN + int(max(font.getlength(label) for label in labels) + 1)
    size = (left + columns * (width + GAP), GAP + len(strips) * (height + GAP))
    canvas = Image.new("L" if channels == 1 else "RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for row, strip in enumerate(strips):
        top = GAP + row * (height + GAP)
        for column, image in enumerate(strip):
            tile = Image.fromarray(_pixels(image))
            tile = tile.resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + column * (width + GAP), top))
        if labels:
            place = (LABEL_MARGIN, top + height // 2)
            pen.text(place, labels[row], fill="black", font=font, anchor="lm")
    return canvas
