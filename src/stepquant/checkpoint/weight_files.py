"""The safetensors files of one component in a diffusers folder, read tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.utils.constants import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepquant.errors import StepQuantError

REMEDY = "fetch or write the folder again"


class WeightFiles:
    """Tensors of the component in `folder`, by name: one file, or shards with an index.

    Only headers are read at first. Raises StepQuantError, naming file or tensor, for what is
    absent, damaged or no safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise StepQuantError(
                    f"'{index}' cannot be read as the index of shards ({error!r}): expected what "
                    f"save_pretrained writes; {REMEDY}"
                ) from error
            paths = [folder / name for name in sorted(names)]
        else:
            paths = [folder / SAFETENSORS_WEIGHTS_NAME]
        self._files: dict[str, Path] = {}
        self.meta: dict[str, Tensor] = {}  # each tensor without its data
        for path in paths:
            self._read_header(path)

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    # Mapped, not read: only what is touched comes from the disk.
                    tensor = file.get_tensor(name)
                    self.meta[name] = torch.empty_like(tensor, device="meta")
                    self._files[name] = path
        except (OSError, SafetensorError) as error:
            raise StepQuantError(
                f"'{path}' cannot be read as safetensors ({error}): expected the weights of "
                f"'{self.folder.name}'; {REMEDY}"
            ) from error

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.meta.values())

    def read(self, name: str) -> Tensor:
        """The tensor `name`, mapped from its file: memory is taken as far as it is touched.

        Each call maps anew. A mapping's pages count as the process's until it is closed, so one
        that served all tensors would grow to the size of the file.
        """
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)
