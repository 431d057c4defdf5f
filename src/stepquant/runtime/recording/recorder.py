"""Writes down what a call runs: native kernels with their arguments, and torch's operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stepquant.models.calling import inside, tensors_in, with_tensors
from stepquant.runtime.native import FUNCTIONS, Library, called_instead, library
from stepquant.runtime.native.calls import fail
from stepquant.runtime.recording.memory import Memory

aten = torch.ops.aten
EMPTY = (
    *(aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default),
    *(aten.new_empty.default, aten.new_empty_strided.default),
)
CPU = torch.device("cpu")
READS_NUMBERS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class NotRecordable(Exception):
    """The call does something that a replay would not do, in a sentence."""


@dataclass(frozen=True)
class NativeCall:
    """A function of the native library with its arguments, which hold addresses."""

    function: Callable[..., int]
    arguments: tuple[Any, ...]

    def __call__(self) -> None:
        """Run it, with the library's errors."""
        status = self.function(*self.arguments)
        if status:
            fail(status)


@dataclass(frozen=True)
class Operator:
    """An operator of torch; its results go where those of the recorded call lie."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Tensor, ...]  # none where it only writes to its arguments

    def __call__(self) -> None:
        """Run it."""
        found = self.function(*self.args, **self.kwargs)
        if self.results:
            for result, tensor in zip(self.results, tensors_in(found), strict=True):
                result.copy_(tensor)


class _Listening(Library):
    """The functions of another library, each of whose calls is noted."""

    def __init__(self, of: Library, note: Callable[[NativeCall], None]) -> None:
        self.level, self.product_level = of.level, of.product_level
        for name in FUNCTIONS:
            function = getattr(of, name)
            setattr(self, name, None if function is None else _noted(function, note))


def _noted(function: Callable[..., int], note: Callable[[NativeCall], None]) -> Callable[..., int]:
    def call(*arguments: Any) -> int:
        note(NativeCall(function, arguments))
        return function(*arguments)

    return call


class Recorder(TorchDispatchMode):
    """Notes what runs while it is entered, without gradients, and keeps values in its memory.

    `calls`: what to run again, in order. Raises NotRecordable where a number is read out of a
    tensor: what Python makes of it would not change in a replay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.calls: list[NativeCall | Operator] = []
        self._inside = False  # an operator, whose own native calls are its matter

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, torch's operators and calls of the native library are noted."""
        native = library()
        assert native is not None
        with called_instead(_Listening(native, self._note)), self:
            yield

    def _note(self, call: NativeCall) -> None:
        if not self._inside:
            self.calls.append(call)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator and note it."""
        kwargs = kwargs or {}
        if any(tag in func.tags for tag in READS_NUMBERS):
            raise NotRecordable(f"it reads numbers out of a tensor ({func})")
        if func in EMPTY and kwargs.get("device") in (None, CPU):
            planned = func(*args, **{**kwargs, "device": "meta"})
            return self.memory.empty(planned.shape, planned.stride(), planned.dtype)
        given = tensors_in([args, kwargs])
        self._inside = True
        try:
            found = func(*args, **kwargs)
        finally:
            self._inside = False
        results = tensors_in(found)
        if any(tensor.layout != torch.strided or not tensor.is_cpu for tensor in results):
            raise NotRecordable(f"{func} gives what is no plain tensor on the CPU")
        writes = any(
            each.alias_info is not None and each.alias_info.is_write
            for each in func._schema.arguments
        )
        at_hand = {tensor.untyped_storage().data_ptr() for tensor in given}
        views = all(tensor.untyped_storage().data_ptr() in at_hand for tensor in results)
        if writes and not views:
            raise NotRecordable(f"{func} writes to what it is given and gives something new")
        if writes or (views and results):
            if writes:
                self.calls.append(Operator(func, self._kept(args), self._kept(kwargs), ()))
            return found
        own = iter(
            [self.memory.empty(t.shape, t.stride(), t.dtype).copy_(t.detach()) for t in results]
        )
        found = with_tensors(found, own)
        outs = tuple(self._kept(tensors_in(found)))
        self.calls.append(Operator(func, self._kept(args), self._kept(kwargs), outs))
        return found

    def _kept(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.memory.kept(value)
        return inside(value, self._kept)
