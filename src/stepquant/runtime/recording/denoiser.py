"""A packed denoiser whose calls are recorded: `pipeline.unet = RecordedDenoiser(pipeline.unet)`."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.models.calling import (
    leaves_in,
    prediction_in,
    tensors_in,
    with_prediction,
    with_tensors,
)
from stepquant.runtime.packed import is_packed
from stepquant.runtime.recording.recorder import NotRecordable, Recorder
from stepquant.runtime.recording.state import State, why_not
from stepquant.runtime.stand_in import StandIn

MOST_SHAPES = 8  # that recordings are kept of, each with its memory
PLAIN = (Tensor, bool, int, float, str, type(None))
LOGGER = logging.getLogger(__name__)


class RecordedDenoiser(StandIn):
    """Records a packed denoiser's call at the second of the same shapes, and replays it then.

    A replay runs the same kernels on the same memory, without the Python between them, and gives
    the same numbers bit by bit: the first one on other inputs is compared with the denoiser's own
    result. Timesteps, samples and conditions are copied into the recording; what is not a tensor is
    part of what has to be the same. Whatever cannot be recorded runs as ever: with gradients,
    autocast, torch.compile, a LoRA, hooks, samples at different steps, tensors that are not on the
    CPU, a machine without the native integer products. A recording is dropped where the parts of
    the denoiser, its hooks, packed layers, threads or the memory of its tensors have changed. Other
    changes (attributes of diffusers' modules, as FreeU's) are not seen: `forget` after them.

    Every other attribute is that of `denoiser`, which stays as it is. Calls from several threads
    run one after another.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        """Nothing is recorded yet."""
        super().__init__(denoiser)
        self._begin()

    def _begin(self) -> None:
        self._names = _names(self.denoiser)
        self._lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Drop all recordings."""
        # By a call's shapes: None where it was seen once, a sentence where it stays as it is.
        self._shapes: dict[Any, _Recording | str | None] = {}
        self._state: State | None = None

    @property
    def recordings(self) -> int:
        """How many shapes of calls are replayed."""
        return sum(isinstance(each, _Recording) for each in self._shapes.values())

    @property
    def reasons(self) -> list[str]:
        """Why calls of some shapes are not recorded."""
        return [each for each in self._shapes.values() if isinstance(each, str)]

    @property
    def nbytes(self) -> int:
        """What recordings hold in memory for the values between kernels."""
        held = [each for each in self._shapes.values() if isinstance(each, _Recording)]
        return sum(each.nbytes for each in held)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def plain() -> Any:
            return self.denoiser(*args, **kwargs)

        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        if len(args) > len(self._names) or not _is_plain(arguments):
            return plain()
        arguments["timestep"] = _one_for_all(arguments.get("timestep"))
        with self._lock, torch.inference_mode(False), torch.no_grad():
            return self._run(arguments, plain)

    def _run(self, arguments: dict[str, Any], plain: Callable[[], Any]) -> Any:
        if self._state is not None and not self._state.unchanged():
            self.forget()
        key, tensors = _description(arguments), tensors_in(arguments)
        if key not in self._shapes:
            while len(self._shapes) >= MOST_SHAPES:
                del self._shapes[next(iter(self._shapes))]
            self._shapes[key] = None
            return plain()
        known = self._shapes[key]
        if known is None:
            return self._record(key, arguments, plain)
        if isinstance(known, str):
            return plain()
        if known.compared or known.holds(tensors):
            return known.replay(tensors)
        return self._compare(key, known, tensors, plain)

    def _record(self, key: Any, arguments: dict[str, Any], plain: Callable[[], Any]) -> Any:
        reason = why_not(self.denoiser)
        if reason is None:
            try:
                recording, output = _record(self.denoiser, arguments)
            except NotRecordable as found:
                reason = str(found)
        if reason is not None:
            self._stay(key, reason)
            return plain()
        self._state = self._state or State(self.denoiser)
        self._shapes[key] = recording
        return output

    def _compare(
        self, key: Any, recording: _Recording, tensors: list[Tensor], plain: Callable[[], Any]
    ) -> Any:
        """The denoiser's own result; the recording is kept if it gives the same."""
        output = plain()
        expected = prediction_in(output, self.denoiser)
        found = prediction_in(recording.replay(tensors), self.denoiser)
        recording.compared = torch.equal(found, expected)
        if not recording.compared:
            self._stay(key, "a replay gives other numbers than the denoiser")
        return output

    def _stay(self, key: Any, reason: str) -> None:
        self._shapes[key] = reason
        name = type(self.denoiser).__name__
        LOGGER.info("calls of %s are not recorded: %s", name, reason)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_shapes", "_state", "_names")
        return {name: value for name, value in super().__getstate__().items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()


def recorded(denoiser: nn.Module) -> nn.Module:
    """A `RecordedDenoiser` for a packed `denoiser` whose calls can be recorded; else itself."""
    if isinstance(denoiser, StandIn) or not is_packed(denoiser) or why_not(denoiser) is not None:
        return denoiser
    return RecordedDenoiser(denoiser)


class _Recording:
    """A call that was written down, with its inputs and its result."""

    def __init__(self, inputs: list[Tensor], recorder: Recorder, output: Any, model: nn.Module):
        self._inputs, self._calls, self._memory = inputs, recorder.calls, recorder.memory
        self._result = recorder.memory.kept(prediction_in(output, model))
        self._template = with_prediction(output, self._result)
        self.compared = False

    @property
    def nbytes(self) -> int:
        inputs = sum(tensor.numel() * tensor.element_size() for tensor in self._inputs)
        return inputs + self._memory.nbytes

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether `tensors` are the inputs that it was run with last."""
        pairs = zip(self._inputs, map(_distinct, tensors), strict=True)
        return all([torch.equal(own, given) for own, given in pairs])

    def replay(self, tensors: list[Tensor]) -> Any:
        """What the denoiser returns for `tensors`."""
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(_distinct(given))
        for call in self._calls:
            call()
        return with_prediction(self._template, self._result.clone())


def _record(denoiser: nn.Module, arguments: dict[str, Any]) -> tuple[_Recording, Any]:
    """The recording of a call, and what the call returned."""
    given = tensors_in(arguments)
    inputs = [_distinct(tensor).clone() for tensor in given]
    expanded = [own.expand(tensor.shape) for own, tensor in zip(inputs, given, strict=True)]
    recorder = Recorder()
    with recorder.listening():
        output = denoiser(**with_tensors(arguments, iter(expanded)))
    if len(tensors_in(output)) > 1:
        raise NotRecordable("it returns more than the prediction")
    recording = _Recording(inputs, recorder, output, denoiser)
    return recording, with_prediction(output, prediction_in(output, denoiser).clone())


def _names(denoiser: nn.Module) -> list[str]:
    """Of the arguments, where all can be given by name; else none, and every call runs as ever."""
    parameters = inspect.signature(denoiser.forward).parameters
    unnamed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    return [] if any(each.kind in unnamed for each in parameters.values()) else list(parameters)


def _distinct(tensor: Tensor) -> Tensor:
    """`tensor` without what is repeated in it: dimensions that it was expanded by."""
    if 0 not in tensor.stride():
        return tensor
    return tensor[tuple([slice(None) if step else slice(1) for step in tensor.stride()])]


def _one_for_all(timestep: Any) -> Any:
    """`timestep`, as an expanded number where it is `[B]` and the same for all samples."""
    if not isinstance(timestep, Tensor) or timestep.dim() != 1 or timestep.stride(0) == 0:
        return timestep
    alike = len(timestep) > 1 and bool((timestep == timestep[0]).all())
    return timestep[:1].expand(len(timestep)) if alike else timestep


def _is_plain(arguments: dict[str, Any]) -> bool:
    """Whether a call with them can be recorded, in the mode that torch is in."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    for leaf in leaves_in(arguments):
        if not isinstance(leaf, PLAIN) or (isinstance(leaf, Tensor) and not leaf.is_cpu):
            return False
    return True


def _description(value: Any) -> Any:
    """What has to be the same for a replay: all but the numbers in the tensors."""
    if isinstance(value, Tensor):
        repeated = tuple([step == 0 for step in value.stride()])
        return value.dtype, value.shape, repeated
    if isinstance(value, dict):
        return tuple([(name, _description(entry)) for name, entry in value.items()])
    if type(value) in (tuple, list):
        return type(value), tuple([_description(entry) for entry in value])
    return type(value), value
