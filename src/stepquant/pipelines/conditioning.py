"""Conditions of sampling: prompts, class labels and guidance, as arguments of a pipeline."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from stepquant.support.errors import StepQuantError

# Arguments of pipelines that stepquant sets itself, each with the user's own setting for it.
RESERVED = {
    "prompt": "prompts (--prompt, --prompts)",
    "prompt_embeds": "prompts (--prompt, --prompts)",
    "class_labels": "labels (--label)",
    "batch_size": "num, and batch for how many at a time",
    "num_images_per_prompt": "num, and a prompt several times in prompts",
    "generator": "seed",
    "latents": "seed, from which each image's noise is drawn",
    "num_inference_steps": "steps",
    "output_type": "nothing: images come as arrays",
    "return_dict": "nothing: images come as arrays",
}
TEXTS = ("negative_prompt", "prompt_")  # prefixes of arguments with a text for each image
# Arguments with a picture for each image; an IP-Adapter's list has one entry for each adapter.
PICTURES = re.compile(r"(?!ip_adapter)(\w+_)?image")


@dataclass(frozen=True)
class Conditioning:
    """Prompts or class labels, guidance, and further arguments of a pipeline.

    - `prompts`, `labels`: one entry for each image in turn, repeated from the start after the last.
      Without labels, a class-conditional pipeline uses all its classes, in a fixed shuffled order.
    - `guidance`: scale of classifier-free guidance; None keeps the pipeline's own.
    - `call`: further arguments of the pipeline, such as `height`, the same for all images; but a
      list of several pictures that is as long as `prompts` has one for each prompt, and so has each
      list in a list, which pipelines with several ControlNets take.
    """

    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    guidance: float | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        prompts: str | Sequence[str] | None = None,
        labels: Any = None,
        guidance: float | None = None,
        call: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """Build the conditioning from a user's arguments.

        `prompts` and `labels` may each be a single value or several. Labels may also be in a tensor
        or an array.

        Raises:
            StepQuantError: `call` has an argument that stepquant sets itself, guidance is given
                twice, or a label is not a whole number.
        """
        prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts or ())
        call = dict(call or {})
        for name in call.keys() & RESERVED.keys():
            raise StepQuantError(
                f"the call has the argument '{name}', which stepquant sets itself: expected no "
                f"such argument; use {RESERVED[name]}"
            )
        if guidance is not None and "guidance_scale" in call:
            raise StepQuantError(
                f"guidance is {guidance} and the call has the guidance_scale "
                f"{call['guidance_scale']}: expected one of the two; leave out the latter"
            )
        return cls(prompts, _whole_numbers(labels), guidance, call)

    def check(self, pipeline: DiffusionPipeline) -> None:
        """Check that `pipeline` accepts this conditioning.

        Raises:
            StepQuantError: see `arguments`.
        """
        self.arguments(pipeline, 0, 1)

    def arguments(self, pipeline: DiffusionPipeline, first: int, count: int) -> dict[str, Any]:
        """Return the arguments of a call of `pipeline` for images `first` to `first + count - 1`.

        Raises:
            StepQuantError: the pipeline needs prompts or labels that are not given, does not take a
                given condition or argument, or has no class of that number.
        """
        what, known = type(pipeline).__name__, _parameters(pipeline)
        # Pipelines with named arguments silently drop any others.
        named = {"prompt", "class_labels", "batch_size"} & set(known)
        open_ended = not named and inspect.Parameter.VAR_KEYWORD in known.values()
        chosen = range(first, first + count)
        found: dict[str, Any] = {
            name: _texts(value, chosen) if name.startswith(TEXTS) else value
            for name, value in self.call.items()
        }
        several = _takes_several_pictures(pipeline)
        for name, value in found.items():
            nested = isinstance(value, list | tuple) and any(
                isinstance(entry, list | tuple) for entry in value
            )
            if PICTURES.fullmatch(name) and (nested or not several):
                found[name] = _pictures(value, chosen, len(self.prompts))
        if self.guidance is not None:
            found["guidance_scale"] = self.guidance
        for name in found:
            if name not in known and not open_ended:
                raise StepQuantError(
                    f"{what} takes no '{name}': expected one of its arguments, "
                    f"{', '.join(sorted(known))}"
                )
        if self.prompts and "prompt" not in known:
            raise StepQuantError(f"{what} takes no prompts: expected none; leave them out")
        if self.labels and "class_labels" not in known:
            raise StepQuantError(f"{what} takes no class labels: expected none; leave them out")
        if "prompt" in known:
            if not self.prompts:
                raise StepQuantError(
                    f"{what} needs prompts and got none: expected prompts like those of its later "
                    "use; pass prompts=[...], --prompt TEXT or --prompts FILE"
                )
            found["prompt"] = [self.prompts[i % len(self.prompts)] for i in chosen]
        elif "class_labels" in known:
            labels = self._labels(pipeline)
            found["class_labels"] = [labels[i % len(labels)] for i in chosen]
        else:
            found["batch_size"] = count
        return found

    def _labels(self, pipeline: DiffusionPipeline) -> tuple[int, ...]:
        classes = class_count(pipeline)
        if not self.labels:
            if classes is None:
                raise StepQuantError(
                    f"{type(pipeline).__name__} needs class labels and its config does not give "
                    "the number of classes: expected labels; pass labels=[...] or --label NUMBER"
                )
            order = torch.randperm(classes, generator=torch.Generator().manual_seed(0))
            return tuple(order.tolist())
        for label in self.labels:
            if classes is not None and not 0 <= label < classes:
                raise StepQuantError(f"class label is {label}: expected 0 to {classes - 1}")
        return self.labels

    def describe(self) -> dict[str, Any]:
        """Return the conditioning as JSON values, for the provenance of a checkpoint.

        Prompts are given by their number and SHA-256.

        Raises:
            StepQuantError: a value in `call` cannot be described; see `described`.
        """
        found: dict[str, Any] = {}
        if self.prompts:
            text = json.dumps(self.prompts).encode()
            found["prompts"] = len(self.prompts)
            found["prompts_sha256"] = hashlib.sha256(text).hexdigest()
        if self.labels:
            found["labels"] = list(self.labels)
        if self.guidance is not None:
            found["guidance"] = self.guidance
        if self.call:
            found["call"] = {
                name: described(value, f"'{name}' of the call")
                for name, value in sorted(self.call.items())
            }
        return found


def _whole_numbers(labels: Any) -> tuple[int, ...]:
    """Return one or several labels as a tuple of ints.

    Raises:
        StepQuantError: a label is not a whole number.
    """
    if labels is None:
        return ()
    values = labels.tolist() if isinstance(labels, torch.Tensor | np.ndarray) else labels
    values = list(values) if isinstance(values, Iterable) else [values]
    for value in values:
        if not isinstance(value, int | np.integer):
            raise StepQuantError(f"class label is {value!r}: expected a whole number")
    return tuple(int(value) for value in values)


def _texts(value: Any, chosen: Sequence[int]) -> Any:
    """Return a text for each of the images `chosen`: one text for all, or several in turn.

    Values that are neither a text nor texts are returned unchanged.
    """
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list | tuple) or not all(isinstance(v, str) for v in several):
        return value
    return [several[i % len(several)] for i in chosen] if several else value


def _takes_several_pictures(pipeline: DiffusionPipeline) -> bool:
    """Whether a list holds a picture for each ControlNet or T2I-Adapter of `pipeline`."""
    kinds = [type(getattr(pipeline, name, None)) for name in ("controlnet", "adapter")]
    return any(kind.__name__.startswith("Multi") for kind in kinds)


def _pictures(value: Any, chosen: Sequence[int], prompts: int) -> Any:
    """Return a picture for each of the images `chosen`, if `value` is a list with one per prompt.

    Other values are returned unchanged, except that each list in a list is such a list.
    """
    if not isinstance(value, list | tuple):
        return value
    if any(isinstance(entry, list | tuple) for entry in value):
        return [_pictures(entry, chosen, prompts) for entry in value]
    each = isinstance(value[0], Image.Image | np.ndarray | torch.Tensor) if value else False
    if not each or len(value) != prompts or prompts == 1:
        return value
    return [value[i % prompts] for i in chosen]


def described(value: Any, what: str) -> Any:
    """Describe `value` by JSON values that are equal for equal contents.

    Tensors, arrays and images are given by type, size and SHA-256; functions and classes by name.

    Raises:
        StepQuantError: `value` is of a type whose contents cannot be described. The message names
            it by `what`.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(entry, what) for key, entry in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [described(entry, what) for entry in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        kind = f"{value.dtype} {list(value.shape)}"
        content = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        kind, content = f"{value.dtype} {list(value.shape)}", value.tobytes()
    elif isinstance(value, Image.Image):
        kind, content = f"image {value.mode} {list(value.size)}", value.tobytes()
    elif isinstance(value, torch.dtype | torch.device):
        return str(value)
    elif hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    else:
        raise StepQuantError(
            f"{what} is a {type(value).__name__}, whose contents a record cannot describe: "
            "expected numbers, texts, tensors, arrays, images, functions, and lists and "
            "dictionaries of these"
        )
    return f"{kind} sha256 {hashlib.sha256(content).hexdigest()}"


def class_count(pipeline: DiffusionPipeline) -> int | None:
    """Return the number of classes in the denoiser's config, or None if it has none."""
    for name in ("unet", "transformer"):
        config = getattr(getattr(pipeline, name, None), "config", None) or {}
        for key in ("num_embeds_ada_norm", "num_class_embeds"):
            if config.get(key) is not None:
                return int(config[key])
    return None


def takes_prompts(pipeline: DiffusionPipeline) -> bool:
    """Whether `pipeline` takes prompts."""
    return "prompt" in _parameters(pipeline)


def _parameters(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Return the kind of each argument of the pipeline's `__call__`, by name."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return {name: parameter.kind for name, parameter in parameters.items() if name != "self"}
