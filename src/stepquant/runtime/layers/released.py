"""A tensor that stands in for packed weights without keeping their bytes in memory.

A kernel's layout of the weight contains all information of the packed bytes, so they can be
restored from it on demand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from stepquant.support.errors import StepQuantError

# Methods that bypass `__torch_dispatch__`, or that may return the tensor itself. Their callers
# need the bytes.
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
    """uint8 `[bytes]` without memory; every operation first restores the bytes.

    Shape, dtype and device are those of the bytes, and operations return plain tensors. The
    tensor is read-only. `restored` returns the bytes from data of its own that nothing changes, so
    they stay available whatever happens to the layer.
    """

    restored: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, count: int, restored: Callable[[], Tensor]) -> Released:
        """Create a stand-in for the `count` bytes that `restored` returns, on the CPU."""
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
        """Run a tensor method; methods that read memory get the restored bytes."""
        del types
        if func in _READS:
            args, kwargs = tree_map(whole, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # which torch types as a plain function
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator on the restored bytes.

        Raises StepQuantError if the operator would write to them.
        """
        del types
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and isinstance(given, Released):
                raise StepQuantError(
                    "a layer's packed weights were changed in place after a kernel laid them out: "
                    "change them with load_state_dict, or call set_memory_mode(model, 'low') first"
                )
        args, kwargs = tree_map(whole, (args, kwargs))
        return func(*args, **kwargs)


def whole(value: Any) -> Any:
    """`value`, or the restored bytes if it is a `Released` tensor."""
    return value.restored() if isinstance(value, Released) else value
