"""Hostile changes of the files in a folder: of bytes, of JSON and YAML values, and of tensors."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# What stands in the place of a value of a config.
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**9,
    10**30,
    1.5,
    -1e308,
    1e9,
    "",
    "x",
    "../../etc/passwd",
    "\x1b[2J\r\n\u202e",
    "9" * 5000,
    [],
    [[[]]],
    [None, None],
    ["diffusers", "UNet2DModel"],
    {},
    {"a": {"b": []}},
]
# Each of eleven values stands for nine of the one before it.
ALIASES = b"\n".join(
    b"x%d: &x%d [%s]" % (i, i, b", ".join([b"*x%d" % (i - 1)] * 9)) for i in range(1, 12)
)
TEXTS = [
    b"",
    b"{",
    b"[" * 50_000,
    b"\xff\xfe\x00",
    b"null",
    b"[1, 2]",
    b'{"a": ' * 30_000,
    b"1" * 10_000,
    b"a: &a [*a]\n",
    ALIASES,
    b"x0: &x0 [a, a]\n" + ALIASES,
]


def mutate(folder: Path, names: list[str], draw: random.Random) -> str:
    """Change one of the files `names` in `folder`, or two of them; return what was done."""
    done = []
    for _ in range(1 if draw.random() < 0.8 else 2):
        path = folder / draw.choice(names)
        if not path.is_file():
            continue
        done.append(f"{path.relative_to(folder)}: {_one(path, draw)}")
    return "; ".join(done)


def _one(path: Path, draw: random.Random) -> str:
    kinds: list[Callable[[Path, random.Random], str]] = [bytes_of]
    if path.suffix == ".safetensors":
        kinds += [header_of, tensors_of, tensors_of]
    if path.suffix == ".json":
        kinds += [values_of, values_of, values_of, whole_text]
    if path.suffix == ".yaml":
        kinds += [lines_of, lines_of, whole_text]
    return draw.choice(kinds)(path, draw)


def bytes_of(path: Path, draw: random.Random) -> str:
    """Flip a bit, cut, double or replace a part, or take the file away."""
    content = bytearray(path.read_bytes())
    place = draw.randrange(max(1, len(content)))
    kind = draw.choice(["flip", "flip", "flip", "cut", "insert", "zero", "gone", "folder"])
    if kind == "flip" and content:
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = draw.randbytes(draw.choice([1, 8, 100]))
    elif kind == "zero":
        content[place : place + 16] = bytes(16)
    elif kind in ("gone", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        return kind
    path.write_bytes(content)
    return f"{kind} at byte {place}"


def whole_text(path: Path, draw: random.Random) -> str:
    """Replace the whole file."""
    number = draw.randrange(len(TEXTS))
    path.write_bytes(TEXTS[number])
    return f"text {number}"


def values_of(path: Path, draw: random.Random) -> str:
    """Replace, remove, rename or add a value, at any depth."""
    try:
        root = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return bytes_of(path, draw)
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            places.append((value, key))
            if isinstance(value[key], dict | list):
                visit(value[key])

    if isinstance(root, dict | list):
        visit(root)
    if not places:
        return bytes_of(path, draw)
    holder, key = draw.choice(places)
    kind = draw.choice(["replace", "replace", "replace", "remove", "rename", "add"])
    value = draw.choice(VALUES)
    if kind == "replace" or not isinstance(holder, dict):
        holder[key] = value
    elif kind == "remove":
        del holder[key]
    elif kind == "rename":
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[draw.choice(["x", "_x", "\x1b[2J", "layers"])] = value
    path.write_text(json.dumps(root))
    return f"{kind} '{key}' by {str(value)[:40]!a}"


def lines_of(path: Path, draw: random.Random) -> str:
    """Replace the value of a line, or remove, double or indent the line."""
    lines = path.read_text(errors="replace").splitlines()
    if not lines:
        return bytes_of(path, draw)
    number = draw.randrange(len(lines))
    kind = draw.choice(["value", "value", "value", "remove", "double", "indent"])
    if kind == "value":
        key = lines[number].partition(":")[0]
        lines[number] = f"{key}: {json.dumps(draw.choice(VALUES))}"
    elif kind == "remove":
        del lines[number]
    elif kind == "double":
        lines.insert(number, lines[number])
    else:
        lines[number] = "  " + lines[number]
    path.write_text("\n".join(lines) + "\n")
    return f"{kind} at line {number}"


def header_of(path: Path, draw: random.Random) -> str:
    """Change a byte of the header of a safetensors file, or the length that it claims."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    if len(content) < 16 or draw.random() < 0.2:
        content[:8] = draw.choice([0, 1, 2**31, 2**63, length + 8]).to_bytes(8, "little")
        path.write_bytes(content)
        return "another length of the header"
    place = 8 + draw.randrange(max(1, min(length, len(content) - 8)))
    content[place] = draw.choice(b'0123456789"{}[],:aFIx\x00\xff')
    path.write_bytes(content)
    return f"byte {place} of the header"


def tensors_of(path: Path, draw: random.Random) -> str:
    """Change, swap, remove, add or reshape tensors, and write a sound file of them."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception:
        return bytes_of(path, draw)
    if not tensors:
        return bytes_of(path, draw)
    name, other = draw.choice(sorted(tensors)), draw.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = draw.choice(
        [
            "value",
            "nan",
            "inf",
            "zero",
            "swap",
            "remove",
            "add",
            "dtype",
            "shape",
            "empty",
            "rename",
        ]
    )
    if kind in ("value", "nan", "inf") and tensor.numel():
        place = draw.randrange(tensor.numel())
        flat = tensor.reshape(-1)
        if tensor.is_floating_point():
            flat[place] = {"value": 3.25, "nan": float("nan"), "inf": float("inf")}[kind]
        else:
            flat[place] = flat[place].bitwise_xor(1)
        tensors[name] = flat.view(tensor.shape)
    elif kind == "zero":
        tensors[name] = torch.zeros_like(tensor)
    elif kind == "swap":
        tensors[name], tensors[other] = tensors[other], tensor
    elif kind == "remove":
        del tensors[name]
    elif kind == "add":
        tensors[draw.choice([f"{name}x", "x", "stepquant_sha256", "step_grid", "\x1b[2J"])] = tensor
    elif kind == "dtype":
        dtypes = [torch.float16, torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn]
        tensors[name] = tensor.to(draw.choice(dtypes))
    elif kind == "shape":
        tensors[name] = tensor.unsqueeze(0) if draw.random() < 0.5 else tensor.reshape(-1)[:1]
    elif kind == "empty":
        tensors[name] = tensor.new_empty(0)
    else:
        tensors[f"{name}x"] = tensors.pop(name)
    whole = {key: value.contiguous().clone() for key, value in tensors.items()}
    save_file(whole, path, metadata)
    return f"{kind} of {name!a} ({other!a})"
