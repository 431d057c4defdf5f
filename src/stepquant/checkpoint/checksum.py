"""SHA-256 over everything in a checkpoint that its results depend on.

The checkpoint stores it as the tensor `stepquant_sha256` (uint8 `[32]`). The metadata of the
safetensors header would not do: safetensors writes it in random order, so that two equal models
would get different files.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from stepquant.support.errors import StepQuantError

CHECKSUM_NAME = "stepquant_sha256"


def tensor_line(name: str, tensor: Tensor) -> str:
    """Return the line `name dtype sha256-of-the-bytes`, by which the checksum covers a tensor."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{name} {dtype} {hashlib.sha256(data.numpy().data).hexdigest()}\n"


def checksum(layers_json: str, tensor_lines: list[str]) -> bytes:
    """Return the SHA-256 of `layers_json`, a newline, and the sorted `tensor_lines`.

    `layers_json` is `StepQuantConfig.layers_json()`. The lines are those of `tensor_line`.
    """
    text = layers_json + "\n" + "".join(sorted(tensor_lines))
    return hashlib.sha256(text.encode()).digest()


class FileChecksum:
    """The checksum of a component, gathered from its files while they are loaded."""

    def __init__(self) -> None:
        self.stored: bytes | None = None
        self._lines: list[str] = []

    def take(self, name: str, tensor: Tensor) -> None:
        """Take a tensor as it is in the file.

        Raises:
            StepQuantError: it is the checksum, but not uint8 `[32]`.
        """
        if name == CHECKSUM_NAME:
            self.stored = read_checksum(tensor)
        else:
            self._lines.append(tensor_line(name, tensor))

    def check(self, layers_json: str, remedy: str) -> None:
        """Compare the stored checksum with that of the tensors taken and of `layers_json`.

        Raises:
            StepQuantError: they differ, or none is stored.
        """
        expected = checksum(layers_json, self._lines)
        if self.stored != expected:
            raise StepQuantError(
                f"the tensors and layers of the checkpoint have the SHA-256 {expected.hex()}: "
                f"expected {(self.stored or b'').hex()}, as '{CHECKSUM_NAME}' says; {remedy}"
            )


def checksum_tensor(digest: bytes) -> Tensor:
    """Return `digest` as a tensor, uint8 `[32]`."""
    return torch.tensor(list(digest), dtype=torch.uint8)


def read_checksum(tensor: Tensor) -> bytes:
    """Return the digest that `tensor` holds.

    Raises:
        StepQuantError: `tensor` is not uint8 `[32]`.
    """
    if tensor.dtype != torch.uint8 or tensor.shape != (32,):
        raise StepQuantError(
            f"tensor '{CHECKSUM_NAME}' is {tensor.dtype} of shape {tuple(tensor.shape)}: expected "
            "torch.uint8 of shape (32,)"
        )
    return bytes(tensor.tolist())
