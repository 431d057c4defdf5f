"""Captures what a call runs: native kernels with their arguments, and torch operators."""

from __future__ import annotations

import bisect
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from stepquant.engines.captured_calls.memory import Memory, storage_address
from stepquant.models.calling import tensors_in, with_tensors
from stepquant.models.non_finite import NonFiniteError
from stepquant.runtime.ops.native import FUNCTIONS, Library, called_instead, library
from stepquant.runtime.ops.native.calls import NOT_FINITE, fail

aten = torch.ops.aten
EMPTY = (
    *(aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default),
    *(aten.new_empty.default, aten.new_empty_strided.default),
)
CPU = torch.device("cpu")
READS_NUMBERS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
READS_ALL = (Tensor.tolist, Tensor.numpy, Tensor.__array__)  # methods that run no operator
LOWEST_ADDRESS = 1 << 32  # larger than all other kernel arguments, such as sizes and strides


class NotRecordable(Exception):
    """The call does something that a replay cannot reproduce; the message says what."""


@dataclass(frozen=True)
class NativeCall:
    """A native function with its arguments, which contain addresses."""

    function: Callable[..., int]
    arguments: tuple[Any, ...]

    def __call__(self) -> None:
        """Run the function; raises NonFiniteError, or as `native.calls.fail` does."""
        status = self.function(*self.arguments)
        if status:
            _fail(status)

    def addresses(self) -> Iterator[int]:
        """The addresses that the function reads or writes.

        Structures consist of 8-byte words (`native/abi.h`).
        """
        for argument in self.arguments:
            if isinstance(argument, bytes):
                words = struct.unpack(f"{len(argument) // 8}q", argument)
                yield from (word for word in words if word >= LOWEST_ADDRESS)
            elif isinstance(argument, int) and argument >= LOWEST_ADDRESS:
                yield argument


@dataclass(frozen=True)
class Operator:
    """A torch operator; its results are copied to the recorded results' memory."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Tensor, ...]  # empty if the operator only writes to its arguments

    def __call__(self) -> None:
        """Run the operator."""
        found = self.function(*self.args, **self.kwargs)
        if self.results:
            for result, tensor in zip(self.results, tensors_in(found), strict=True):
                result.copy_(tensor)


class _Listening(Library):
    """A proxy for another library that passes each call to `note` and then runs it."""

    def __init__(self, of: Library, note: Callable[[NativeCall], None]) -> None:
        self.level, self.product_level = of.level, of.product_level
        for name in FUNCTIONS:
            function = getattr(of, name)
            setattr(self, name, None if function is None else _noted(function, note))


def _noted(function: Callable[..., int], note: Callable[[NativeCall], None]) -> Callable[..., int]:
    def call(*arguments: Any) -> int:
        note(NativeCall(function, arguments))
        status = function(*arguments)
        if status == NOT_FINITE:
            _fail(status)
        return status

    return call


def _fail(status: int) -> None:
    if status == NOT_FINITE:
        raise NonFiniteError("a captured kernel met NaN or infinity: expected finite numbers")
    fail(status)


class _NoReading(TorchFunctionMode):
    """Raises NotRecordable when Python reads a whole tensor, which no operator shows."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in READS_ALL:
            raise NotRecordable(f"it reads numbers out of a tensor ({func.__name__})")
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Captures all kernels and operators while it is entered; results lie in its memory.

    It runs without gradients. `calls` holds the captured calls in order. It raises NotRecordable

    - when Python reads a number out of a tensor, because a replay could not react to a new value;
    - when an operator draws random numbers;
    - when an operator writes to a tensor that the call has not created.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.calls: list[NativeCall | Operator] = []
        self._inside = False  # True while an operator runs: a replay repeats its native calls
        self._others: dict[int, Tensor] = {}  # by address: operands outside `memory`

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Capture torch operators and calls of the native library within this context."""
        native = library()
        assert native is not None
        with called_instead(_Listening(native, self._note)), _NoReading(), self:
            yield

    def check_addresses(self, known: Iterable[Tensor]) -> None:
        """Raise NotRecordable if a native call uses memory that may be gone in a replay.

        Safe is the memory of the recorder, of the `known` tensors and of the operators' operands.
        """
        held = [each.untyped_storage() for each in (*known, *self._others.values())]
        spans = sorted([*self.memory.spans(), *((s.data_ptr(), s.nbytes()) for s in held)])
        starts = [start for start, _ in spans]
        for call in self.calls:
            for address in call.addresses() if isinstance(call, NativeCall) else ():
                at = bisect.bisect_right(starts, address) - 1
                if at < 0 or address >= starts[at] + max(spans[at][1], 1):
                    raise NotRecordable("a kernel reads a tensor that is no part of the model")

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
        """Run an operator and capture it."""
        kwargs = kwargs or {}
        _check(func, args, kwargs)
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
        at_hand = {storage_address(tensor) for tensor in given}
        views = bool(results) and all(storage_address(each) in at_hand for each in results)
        written = _written(func, args, kwargs)
        if any(not self.memory.holds(tensor) for tensor in written):
            raise NotRecordable(f"{func} writes to a tensor that the call has not made")
        if written and not views:
            raise NotRecordable(f"{func} writes to what it is given and gives something new")
        self._keep_others([*given, *results] if views else given)
        if views:
            if written:
                self.calls.append(Operator(func, self._kept(args), self._kept(kwargs), ()))
            return found
        own = [self.memory.empty(each.shape, _strides(each), each.dtype) for each in results]
        for place, tensor in zip(own, results, strict=True):
            place.copy_(tensor)
        found = with_tensors(found, iter(own))
        outs = tuple(self._kept(own))
        self.calls.append(Operator(func, self._kept(args), self._kept(kwargs), outs))
        return found

    def _keep_others(self, tensors: list[Tensor]) -> None:
        """Hold the `tensors` outside `memory`: native calls may know only their addresses."""
        for tensor in tensors:
            address = storage_address(tensor)
            if address is not None and not self.memory.holds(tensor):
                self._others.setdefault(address, tensor)

    def _kept(self, value: Any) -> Any:
        return tree_map_only(Tensor, self.memory.kept, value)


def _check(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # `index` has the tag because of masks; with integer indices the shape does not depend on data.
    whole = func is aten.index.Tensor and all(
        index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1]
    )
    if not whole and any(tag in func.tags for tag in READS_NUMBERS):
        raise NotRecordable(f"it reads numbers out of a tensor ({func})")
    without = _argument(func, args, kwargs, "dropout_p") == 0.0  # attention
    if torch.Tag.nondeterministic_seeded in func.tags and not without:
        raise NotRecordable(f"it draws random numbers ({func})")


def _argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The operator's argument `name`, or its default; None if there is no such argument."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[number] if number < len(args) else kwargs.get(name, argument.default_value)
    return None


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes to."""
    names = [
        argument.name
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return tensors_in([_argument(func, args, kwargs, name) for name in names])


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of `tensor`; if it is expanded, those of a contiguous tensor of its shape."""
    strides = tensor.stride()
    return torch.empty(tensor.shape, device="meta").stride() if 0 in strides else strides
