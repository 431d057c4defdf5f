"""A tensor that stands in for packed weights whose bytes are not kept.

A kernel's layout of the weight holds all that the packed bytes say. So the bytes need not be in
memory as well, as long as whoever asks for them gets them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from stepquant.support.errors import StepQuantError

# What torch answers without asking `__torch_dispatch__`, and what may answer with the tensor
# itself: a caller that asks for these wants bytes.
_READS = {
    Tensor.__array__,
    Tensor.__deepcopy__,
    Tensor.__reduce_ex__,
    Tensor.__repr__,
    Tensor.contiguous,
    Tensor.cpu,
    Tensor.cuda,
    Tensor.data_ptr,
    Tensor.numpy,
    Tensor.storage,
    Tensor.to,
    Tensor.tolist,
    Tensor.type,
    Tensor.untyped_storage,
}


class Released(Tensor):
    """uint8 `[bytes]` without memory: `restored` makes the bytes, and so does every operation.

    Shape, dtype and device are those of the bytes, results of operations are plain tensors. It
    cannot be written to. What it makes bytes from, it holds itself, and never changes: it is whole
    whatever becomes of its layer.
    """

    restored: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, count: int, restored: Callable[[], Tensor]) -> Released:
        """Stands in for the `count` bytes that `restored` makes, on the CPU."""
        cpu = torch.device("cpu")
        made = Tensor._make_wrapper_subclass(cls, (count,), dtype=torch.uint8, device=cpu)
        made.restored = restored
        return made

    def __init__(self, count: int, restored: Callable[[], Tensor]) -> None:
        del count, restored

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Methods of a tensor: those that read bytes get them, others go the usual way."""
        del types
        if func in _READS:
            args, kwargs = tree_map(whole, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # which torch types as a plain function
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Operators, on the bytes.

        Raises StepQuantError where one would write to them.
        """
        del types
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and isinstance(given, Released):
                raise StepQuantError(
                    "the packed weights of a layer were changed in place after they were laid out "
                    "for a kernel: expected load_state_dict, or a call of set_memory_mode(model, "
                    "'low') first"
                )
        args, kwargs = tree_map(whole, (args, kwargs))
        return func(*args, **kwargs)


def whole(value: Any) -> Any:
    """`value`, or its bytes if it stands in for some."""
    return value.restored() if isinstance(value, Released) else value
