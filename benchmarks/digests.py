"""SHA-256 of tensors, files and records, without what may differ between two like runs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

VOLATILE = (  # fields of JSON that may differ where nothing else does
    *("versions", "_diffusers_version", "transformers_version", "_name_or_path"),
    *("seconds", "peak_memory_mb", "predicted_peak_memory_mb"),
)


def tensor_digest(tensor: Tensor) -> str:
    return sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())


def file_digests(folder: Path) -> dict[str, str]:
    """Of every file below `folder`; of JSON without the fields of `VOLATILE`."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        found[name] = digest_of(json.loads(content)) if path.suffix == ".json" else sha256(content)
    return found


def digest_of(value: Any) -> str:
    """Of plain values in their order, without the fields of `VOLATILE`."""
    return sha256(json.dumps(lasting(value)).encode())


def lasting(value: Any) -> Any:
    """`value` without the fields of `VOLATILE`, at any depth."""
    if isinstance(value, dict):
        return {key: lasting(entry) for key, entry in value.items() if key not in VOLATILE}
    return [lasting(entry) for entry in value] if isinstance(value, list | tuple) else value


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
