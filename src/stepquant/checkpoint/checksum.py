"""One SHA-256 over everything that a checkpoint computes with.

It lies in the checkpoint as the tensor `stepquant_sha256` (uint8 `[32]`) rather than in the
safetensors header's metadata, which safetensors writes in random order: two equal models would get
different files.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from stepquant.support.errors import StepQuantError

CHECKSUM_NAME = "stepquant_sha256"


def tensor_line(name: str, tensor: Tensor) -> str:
    """`name dtype sha256-of-the-bytes`: what the checksum covers of one tensor."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{name} {dtype} {hashlib.sha256(data.numpy().data).hexdigest()}\n"


def checksum(layers_json: str, tensor_lines: list[str]) -> bytes:
    """SHA-256 of the config's layers, a line end, and the tensors' lines in order of name."""
    text = layers_json + "\n" + "".join(sorted(tensor_lines))
    return hashlib.sha256(text.encode()).digest()


def checksum_tensor(digest: bytes) -> Tensor:
    """The tensor that holds `digest`, uint8 `[32]`."""
    return torch.tensor(list(digest), dtype=torch.uint8)


def read_checksum(tensor: Tensor) -> bytes:
    """The digest that `tensor` holds."""
    if tensor.dtype != torch.uint8 or tensor.shape != (32,):
        raise StepQuantError(
            f"tensor '{CHECKSUM_NAME}' is {tensor.dtype} of shape {tuple(tensor.shape)}: expected "
            "torch.uint8 of shape (32,)"
        )
    return bytes(tensor.tolist())
