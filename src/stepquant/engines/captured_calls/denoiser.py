"""Capture and replay of denoiser calls: `pipeline.unet = RecordedDenoiser(pipeline.unet)`."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from stepquant.engines.captured_calls.recorder import NotRecordable, Recorder
from stepquant.engines.captured_calls.state import State, contexts_of, lay_out, why_not
from stepquant.models.calling import (
    prediction_in,
    tensors_in,
    with_prediction,
    with_tensors,
)
from stepquant.models.non_finite import NonFiniteError
from stepquant.models.stand_in import StandIn
from stepquant.runtime.layers.integer import is_packed

MOST_SHAPES = 8  # limit on recordings, because each has its own memory
COMPARISONS = 3  # replays to check against the denoiser while the timestep stays the same
PLAIN = (Tensor, bool, int, float, str, type(None))
LOGGER = logging.getLogger(__name__)


class RecordedDenoiser(StandIn):
    """A stand-in for a packed denoiser that captures calls and replays them without Python.

    The second call with the same shapes is recorded, and later calls with these shapes replay it.
    A replay runs the same kernels on the same memory and returns the same values, bit for bit. The
    first replays on new inputs are compared with the denoiser's own result: until one at another
    timestep, or three in all, have matched. Tensor arguments are copied into the recording; all
    other arguments must equal the recorded ones.

    The denoiser runs uncaptured

    - while gradients are enabled, and under autocast or torch.compile;
    - in training mode, with a LoRA, with foreign hooks or in the memory mode "low";
    - if it draws random numbers, or if its samples are at different timesteps;
    - if the timestep is not a tensor, or a tensor is not on the CPU;
    - if a call assigns an attribute of one of the denoiser's modules;
    - on machines without native integer products.

    A failed attempt to record a call runs that call twice.

    Recordings are dropped when an attribute of one of the denoiser's modules, the number of threads
    or the memory of a tensor changes (see `state.State`). Call `forget` after changing in place
    what `State` does not see: a list, or an object two levels down.

    All other attributes are those of `denoiser`, which stays unchanged; save `denoiser`, not this
    stand-in. Several threads may call it. Recordings and replays take turns, because a recording
    has one memory; uncaptured calls run in parallel.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        """Wrap `denoiser`, with no recordings yet."""
        super().__init__(denoiser)
        self._begin()

    def _begin(self) -> None:
        self._all_named = _all_named(self.denoiser)
        self._lock, self._busy = threading.RLock(), False
        self.forget()

    def forget(self) -> None:
        """Drop all recordings."""
        self._known = _Known()

    @property
    def recordings(self) -> int:
        """The number of recordings, one per combination of input shapes."""
        return len(self._known.of(_Recording))

    @property
    def reasons(self) -> list[str]:
        """Why calls with some shapes run uncaptured, one sentence per combination of shapes."""
        return self._known.of(str)

    @property
    def nbytes(self) -> int:
        """Memory of all recordings in bytes: inputs and intermediate values."""
        return sum(recording.nbytes for recording in self._known.of(_Recording))

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def plain() -> Any:
            return self.denoiser(*args, **kwargs)

        arguments = self._by_name(args, kwargs)
        named = self._all_named and len(args) <= len(self._names)
        if not named or not _is_plain(arguments):
            return plain()
        arguments["timestep"] = _one_for_all(arguments["timestep"])
        with self._lock:
            if self._busy:  # a denoiser that calls itself
                return plain()
            self._busy = True
            try:
                output = self._captured(arguments, plain)
            except NonFiniteError:  # only the denoiser's own hooks say which samples
                output = AS_EVER
            finally:
                self._busy = False
        return plain() if output is AS_EVER else output

    def _captured(self, arguments: dict[str, Any], plain: Callable[[], Any]) -> Any:
        """The output of a recorded, compared or replayed call; AS_EVER if it runs uncaptured."""
        if self._known.changes_itself:
            return AS_EVER
        if self._known.state is not None and not self._known.state.unchanged():
            self.forget()
        # A local reference: a `forget` during this call replaces `self._known`.
        known, key = self._known, _description(arguments)
        found = known.shapes.pop(key, NEW)
        known.shapes[key] = None if found is NEW else found  # most recently used last
        if found is NEW:
            if len(known.shapes) > MOST_SHAPES:
                del known.shapes[next(iter(known.shapes))]
            return AS_EVER
        if found is None:
            return self._record(known, key, arguments)
        if isinstance(found, str):
            return AS_EVER
        tensors = tensors_in(arguments)
        if found.compared or found.holds(tensors):
            return found.replay(tensors)
        return self._compare(known, key, arguments, plain)

    def _record(self, known: _Known, key: Any, arguments: dict[str, Any]) -> Any:
        refusal = why_not(self.denoiser)
        reason = str(refusal)
        if refusal is None:  # weights laid out during the recording would lie in its memory
            lay_out(self.denoiser)
        state = State(self.denoiser)
        if refusal is None:
            try:
                recording, output = _record(self.denoiser, arguments, state)
                if state.unchanged():
                    known.shapes[key], known.state = recording, state
                else:  # so would every call, and each recording would be dropped at once
                    known.changes_itself = True
                    self._stay(known, key, "a call changes attributes of the denoiser")
                return output
            except NonFiniteError:  # the next call may be another matter
                raise
            except NotRecordable as error:
                reason = str(error)
            except Exception as error:  # from an operator that the recorder does not support
                reason = f"{type(error).__name__} while it was recorded"
        known.state = known.state or state
        self._stay(known, key, reason)
        return AS_EVER

    def _compare(
        self, known: _Known, key: Any, arguments: dict[str, Any], plain: Callable[[], Any]
    ) -> Any:
        """The denoiser's own result; keeps the recording only if a replay gives the same."""
        recording = known.shapes[key]
        output = plain()
        expected = prediction_in(output, self.denoiser)
        found = prediction_in(recording.replay(tensors_in(arguments)), self.denoiser)
        if not torch.equal(found, expected):
            self._stay(known, key, "a replay gives other numbers than the denoiser")
            return output
        recording.comparisons += 1
        elsewhere = not torch.equal(arguments["timestep"], recording.timestep)
        recording.compared = elsewhere or recording.comparisons == COMPARISONS
        return output

    def _stay(self, known: _Known, key: Any, reason: str) -> None:
        known.shapes[key] = reason
        name = type(self.denoiser).__name__
        LOGGER.info("calls of %s are not recorded: %s", name, reason)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_busy", "_known", "_all_named")
        return {name: value for name, value in super().__getstate__().items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()


NEW = object()  # no call with these shapes so far
AS_EVER = object()  # the denoiser runs the call uncaptured


class _Known:
    """Recordings and refusals by input shapes; valid while the denoiser stays unchanged."""

    def __init__(self) -> None:
        # By input shapes, most recently used last: None after the first call, then the recording,
        # or a sentence that says why there is none.
        self.shapes: dict[Any, Any] = {}
        self.state: State | None = None
        self.changes_itself = False  # a call assigns an attribute of the denoiser

    def of(self, kind: type) -> list[Any]:
        return [each for each in self.shapes.values() if isinstance(each, kind)]


def recorded(denoiser: nn.Module) -> nn.Module:
    """`denoiser` in a `RecordedDenoiser` if its calls can be captured; otherwise `denoiser`."""
    if isinstance(denoiser, StandIn) or not is_packed(denoiser) or why_not(denoiser) is not None:
        return denoiser
    return RecordedDenoiser(denoiser)


class _Recording:
    """One captured call: its kernels, input buffers and result."""

    def __init__(
        self,
        inputs: list[Tensor],
        timestep: Tensor,
        recorder: Recorder,
        output: Any,
        result: Tensor,
    ) -> None:
        self.timestep = timestep.clone()
        self.compared, self.comparisons = False, 0
        self._inputs, self._recorder = inputs, recorder
        self._result = recorder.memory.kept(result)
        self._template = with_prediction(output, self._result)

    @property
    def nbytes(self) -> int:
        inputs = sum(tensor.numel() * tensor.element_size() for tensor in self._inputs)
        return inputs + self._recorder.memory.nbytes

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether `tensors` equal the inputs of the latest run."""
        pairs = zip(self._inputs, map(_distinct, tensors), strict=True)
        return all([torch.equal(own, given) for own, given in pairs])

    def replay(self, tensors: list[Tensor]) -> Any:
        """The denoiser's output for `tensors`, which have the recorded shapes and dtypes."""
        with torch.inference_mode(False), torch.no_grad():
            for own, given in zip(self._inputs, tensors, strict=True):
                own.copy_(_distinct(given))
            for call in self._recorder.calls:
                call()
            return with_prediction(self._template, self._result.clone())


@torch.inference_mode(False)
@torch.no_grad()
def _record(denoiser: nn.Module, arguments: dict[str, Any], state: State) -> tuple[_Recording, Any]:
    """Capture one call: the recording, and the call's output."""
    given = tensors_in(arguments)
    inputs = [_distinct(tensor).clone() for tensor in given]
    expanded = [own.expand(tensor.shape) for own, tensor in zip(inputs, given, strict=True)]
    recorder = Recorder()
    try:
        with recorder.listening():
            output = denoiser(**with_tensors(arguments, iter(expanded)))
    finally:
        # Rows outlive the call, but replays overwrite the memory in which this call made them.
        for context in contexts_of(denoiser):
            context.rows = context.rows.clone()
    result = _only_result(output, denoiser)
    recorder.check_addresses([*state.tensors, *inputs])
    recording = _Recording(inputs, arguments["timestep"], recorder, output, result)
    return recording, with_prediction(output, result.clone())


def _only_result(output: Any, denoiser: nn.Module) -> Tensor:
    """The prediction in `output`.

    Raises NotRecordable if `output` holds no tensor, or more than one.
    """
    opened = output
    if dataclasses.is_dataclass(output) and not isinstance(output, dict):  # a leaf to pytree
        opened = list(vars(output).values())
    found = tensors_in(opened)
    if not found:
        raise NotRecordable(f"it returns a {type(output).__name__}")
    if len(found) != 1:
        raise NotRecordable("it returns more than the prediction")
    return prediction_in(output, denoiser)


def _all_named(denoiser: nn.Module) -> bool:
    """Whether all arguments of `forward` can be passed by name, as recording requires."""
    parameters = inspect.signature(denoiser.forward).parameters
    unnamed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    return not any(each.kind in unnamed for each in parameters.values())


def _distinct(tensor: Tensor) -> Tensor:
    """`tensor` with its expanded dimensions (stride 0) cut to size 1."""
    if 0 not in tensor.stride():
        return tensor
    return tensor[tuple([slice(None) if step else slice(1) for step in tensor.stride()])]


def _one_for_all(timestep: Tensor) -> Tensor:
    """`timestep`; if it is `[B]` with equal entries, one number expanded to `[B]`."""
    if timestep.dim() != 1 or timestep.stride(0) == 0:
        return timestep
    alike = len(timestep) > 1 and bool((timestep == timestep[0]).all())
    return timestep[:1].expand(len(timestep)) if alike else timestep


def _is_plain(arguments: dict[str, Any]) -> bool:
    """Whether a call with `arguments` can be recorded under torch's current modes."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if not isinstance(arguments.get("timestep"), Tensor):
        return False
    for leaf in tree_leaves(arguments):
        if not isinstance(leaf, PLAIN) or (isinstance(leaf, Tensor) and not leaf.is_cpu):
            return False
    return True


def _description(arguments: dict[str, Any]) -> Any:
    """The key of a recording: everything about the arguments except the tensors' values."""
    leaves, structure = tree_flatten(arguments)
    return structure, tuple([_description_of_leaf(leaf) for leaf in leaves])


def _description_of_leaf(leaf: Any) -> tuple[Any, ...]:
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    wide = zip(leaf.stride(), leaf.shape, strict=True)
    return leaf.dtype, leaf.shape, tuple([step for step, size in wide if size > 1])
