"""Why fast code does not take a layer, a block or a model: a code to compare and a text to read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class RefusalCode(str, Enum):
    """What stands in the way. Code compares these, never the texts."""

    DEVICE = "device"
    """The tensors are on another device than the code is made for."""
    MACHINE = "machine"
    """Another processor, or a torch without the library that is needed."""
    SHAPE = "shape"
    """Sizes or a dilation that a kernel does not take."""
    NO_LIBRARY = "no-library"
    """The native library is missing or switched off."""
    NO_PRODUCTS = "no-products"
    """There are no native integer products on this machine."""
    NO_VNNI = "no-vnni"
    """Each product takes two kernel calls."""
    OTHER_KERNEL = "other-kernel"
    """The layer runs on a kernel that takes no codes."""
    BACKEND = "backend"
    """The user asked for one kernel by its name."""
    TIMESTEPS = "timesteps"
    """Samples at different timesteps, or timesteps on another device than the CPU."""
    LORA = "lora"
    INPUT_BYPASS = "input-bypass"
    HOOK = "hook"
    TRAINING = "training"
    MEMORY_MODE = "memory-mode"
    ATTENTION_PROCESSOR = "attention-processor"
    LAYER = "layer"
    """A layer of another class, or with several input parts."""
    BLOCK = "block"
    """The block computes something else: another norm, activation or kind of attention."""
    TENSOR = "tensor"
    """The layer computes with a tensor that fast code does not read."""
    MODEL = "model"
    """The model has no integer layers."""


@dataclass(frozen=True)
class Refusal:
    """`code` says what stands in the way; `text` says it to the user."""

    code: RefusalCode
    text: str

    def __str__(self) -> str:
        return self.text
