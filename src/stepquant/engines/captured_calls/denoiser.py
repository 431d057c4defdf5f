"""A packed denoiser whose calls are recorded: `pipeline.unet = RecordedDenoiser(pipeline.unet)`."""

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
from stepquant.models.stand_in import StandIn
from stepquant.runtime.layers.integer import is_packed

MOST_SHAPES = 8  # that recordings are kept of, each with its memory
COMPARISONS = 3  # of a recording's first replays, while the timestep stays the same
PLAIN = (Tensor, bool, int, float, str, type(None))
LOGGER = logging.getLogger(__name__)


class RecordedDenoiser(StandIn):
    """Records a packed denoiser's call at the second of the same shapes, and replays it then.

    A replay runs the same kernels on the same memory, without the Python between them, and gives
    the same numbers bit by bit: the first ones on other inputs are compared with the denoiser's own
    result, until one was at another timestep. Samples, timesteps and conditions are copied into the
    recording; what is not a tensor is part of what has to be the same. Whatever cannot be recorded
    runs as ever: with gradients, autocast, torch.compile, a LoRA, hooks, random numbers, samples at
    different steps, timesteps that are no tensors, tensors that are not on the CPU, a machine
    without the native integer products. To find that out may take a second run of the same call.
    Recordings are dropped where the parts of the denoiser, its hooks, packed layers, attention
    processors, FreeU, threads or the memory of its tensors have changed. Other attributes of its
    modules are not seen: `forget` after changing them.

    Every other attribute is that of `denoiser`, which stays as it is, and which is to be saved.
    Several threads may call it: a recording has one memory, so recording and replays run one after
    another, and calls that run as ever run side by side.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        """Nothing is recorded yet."""
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
        """How many shapes of calls are replayed."""
        return len(self._known.of(_Recording))

    @property
    def reasons(self) -> list[str]:
        """Why calls of some shapes are not recorded."""
        return self._known.of(str)

    @property
    def nbytes(self) -> int:
        """What recordings hold in memory for the values between kernels."""
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
            finally:
                self._busy = False
        return plain() if output is AS_EVER else output

    def _captured(self, arguments: dict[str, Any], plain: Callable[[], Any]) -> Any:
        """The output of a call that is recorded, compared or replayed, or AS_EVER."""
        if self._known.state is not None and not self._known.state.unchanged():
            self.forget()
        known, key = self._known, _description(arguments)  # `forget` in between drops all of it
        found = known.shapes.pop(key, NEW)
        known.shapes[key] = None if found is NEW else found  # the latest is the last one
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
        if refusal is None:  # weights that are laid out while it records would lie in its memory
            lay_out(self.denoiser)
        state = State(self.denoiser)
        if refusal is None:
            try:
                recording, output = _record(self.denoiser, arguments, state)
                known.shapes[key], known.state = recording, state
                return output
            except NotRecordable as error:
                reason = str(error)
            except Exception as error:  # of an operator that the recorder does not know
                reason = f"{type(error).__name__} while it was recorded"
        known.state = known.state or state
        self._stay(known, key, reason)
        return AS_EVER

    def _compare(
        self, known: _Known, key: Any, arguments: dict[str, Any], plain: Callable[[], Any]
    ) -> Any:
        """The denoiser's own result; the recording is kept if it gives the same."""
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


NEW = object()  # a shape of which nothing is known
AS_EVER = object()  # the call is left to the denoiser


class _Known:
    """What is known of a denoiser's calls, as long as the denoiser stays as it is."""

    def __init__(self) -> None:
        # By a call's shapes, the latest last: None where it was seen once, a sentence where it
        # stays as it is, or its recording.
        self.shapes: dict[Any, Any] = {}
        self.state: State | None = None

    def of(self, kind: type) -> list[Any]:
        return [each for each in self.shapes.values() if isinstance(each, kind)]


def recorded(denoiser: nn.Module) -> nn.Module:
    """A `RecordedDenoiser` for a packed `denoiser` whose calls can be recorded; else itself."""
    if isinstance(denoiser, StandIn) or not is_packed(denoiser) or why_not(denoiser) is not None:
        return denoiser
    return RecordedDenoiser(denoiser)


class _Recording:
    """A call that was written down, with its inputs and its result."""

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
        """Whether `tensors` are the inputs that it was run with last."""
        pairs = zip(self._inputs, map(_distinct, tensors), strict=True)
        return all([torch.equal(own, given) for own, given in pairs])

    def replay(self, tensors: list[Tensor]) -> Any:
        """What the denoiser returns for `tensors`."""
        with torch.inference_mode(False), torch.no_grad():
            for own, given in zip(self._inputs, tensors, strict=True):
                own.copy_(_distinct(given))
            for call in self._recorder.calls:
                call()
            return with_prediction(self._template, self._result.clone())


@torch.inference_mode(False)
@torch.no_grad()
def _record(denoiser: nn.Module, arguments: dict[str, Any], state: State) -> tuple[_Recording, Any]:
    """The recording of a call, and what the call returned."""
    given = tensors_in(arguments)
    inputs = [_distinct(tensor).clone() for tensor in given]
    expanded = [own.expand(tensor.shape) for own, tensor in zip(inputs, given, strict=True)]
    recorder = Recorder()
    try:
        with recorder.listening():
            output = denoiser(**with_tensors(arguments, iter(expanded)))
    finally:
        # Rows outlast the call, and those that it made lie where replays write theirs.
        for context in contexts_of(denoiser):
            context.rows = context.rows.clone()
    result = _only_result(output, denoiser)
    recorder.check_addresses([*state.tensors, *inputs])
    recording = _Recording(inputs, arguments["timestep"], recorder, output, result)
    return recording, with_prediction(output, result.clone())


def _only_result(output: Any, denoiser: nn.Module) -> Tensor:
    """The prediction in `output`, if it is the only tensor there."""
    opened = output
    if dataclasses.is_dataclass(output) and not isinstance(output, dict):  # unknown to pytree
        opened = list(vars(output).values())
    found = tensors_in(opened)
    if not found:
        raise NotRecordable(f"it returns a {type(output).__name__}")
    if len(found) != 1:
        raise NotRecordable("it returns more than the prediction")
    return prediction_in(output, denoiser)


def _all_named(denoiser: nn.Module) -> bool:
    """Whether all arguments can be given by name; else every call runs as ever."""
    parameters = inspect.signature(denoiser.forward).parameters
    unnamed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    return not any(each.kind in unnamed for each in parameters.values())


def _distinct(tensor: Tensor) -> Tensor:
    """`tensor` without what is repeated in it: dimensions that it was expanded by."""
    if 0 not in tensor.stride():
        return tensor
    return tensor[tuple([slice(None) if step else slice(1) for step in tensor.stride()])]


def _one_for_all(timestep: Tensor) -> Tensor:
    """`timestep`, as an expanded number where it is `[B]` and the same for all samples."""
    if timestep.dim() != 1 or timestep.stride(0) == 0:
        return timestep
    alike = len(timestep) > 1 and bool((timestep == timestep[0]).all())
    return timestep[:1].expand(len(timestep)) if alike else timestep


def _is_plain(arguments: dict[str, Any]) -> bool:
    """Whether a call with them can be recorded, in the mode that torch is in."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if not isinstance(arguments.get("timestep"), Tensor):
        return False
    for leaf in tree_leaves(arguments):
        if not isinstance(leaf, PLAIN) or (isinstance(leaf, Tensor) and not leaf.is_cpu):
            return False
    return True


def _description(arguments: dict[str, Any]) -> Any:
    """What has to be the same for a replay: all but the numbers in the tensors."""
    leaves, structure = tree_flatten(arguments)
    return structure, tuple([_description_of_leaf(leaf) for leaf in leaves])


def _description_of_leaf(leaf: Any) -> tuple[Any, ...]:
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    wide = zip(leaf.stride(), leaf.shape, strict=True)
    return leaf.dtype, leaf.shape, tuple([step for step, size in wide if size > 1])
