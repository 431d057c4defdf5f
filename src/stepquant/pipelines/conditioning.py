"""What images are drawn of: prompts, class labels, guidance; and how a pipeline takes it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from stepquant.support.errors import StepQuantError

# Arguments of pipelines that are decided elsewhere, each with what a user gives instead.
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
TEXTS = ("negative_prompt", "prompt_")  # beginnings of arguments with a text for each image


@dataclass(frozen=True)
class Conditioning:
    """Prompts or class labels, one after another for image after image, and over again.

    `guidance`: scale of classifier-free guidance; None is the pipeline's own. `call`: further
    arguments of the pipeline, such as `height`, the same for all images. Without labels, a
    class-conditional pipeline draws from all its classes, shuffled, always in the same order.
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
        """From what a user gives: one or several; labels in a tensor or an array, too.

        Raises StepQuantError where `call` has what is given otherwise, and for labels that are no
        whole numbers.
        """
        prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts or ())
        call = dict(call or {})
        for name in call.keys() & RESERVED.keys():
            raise StepQuantError(
                f"the call has a '{name}': expected none, because it is decided elsewhere; use "
                f"{RESERVED[name]}"
            )
        if guidance is not None and "guidance_scale" in call:
            raise StepQuantError(
                f"guidance is {guidance} and the call has the guidance_scale "
                f"{call['guidance_scale']}: expected one of the two; leave out the latter"
            )
        return cls(prompts, _whole_numbers(labels), guidance, call)

    def check(self, pipeline: DiffusionPipeline) -> None:
        """An error where `pipeline` cannot be drawn from like this."""
        self.arguments(pipeline, 0, 1)

    def arguments(self, pipeline: DiffusionPipeline, first: int, count: int) -> dict[str, Any]:
        """Of a call of `pipeline` that draws the images `first` to `first + count - 1`.

        Raises StepQuantError where the pipeline needs prompts and there are none, takes no such
        condition or argument, or has fewer classes.
        """
        what, known = type(pipeline).__name__, _parameters(pipeline)
        # Where a pipeline names its arguments, further ones are taken without a word, and dropped.
        named = {"prompt", "class_labels", "batch_size"} & set(known)
        open_ended = not named and inspect.Parameter.VAR_KEYWORD in known.values()
        chosen = range(first, first + count)
        found: dict[str, Any] = {
            name: _texts(value, chosen) if name.startswith(TEXTS) else value
            for name, value in self.call.items()
        }
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
                    f"{what} draws images of prompts and got none: expected some that are like "
                    "those of its later use; give prompts=[...] or --prompt TEXT, --prompts FILE"
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
                    f"{type(pipeline).__name__} draws images of classes and does not say how many "
                    "it has: expected labels; give labels=[...] or --label NUMBER"
                )
            order = torch.randperm(classes, generator=torch.Generator().manual_seed(0))
            return tuple(order.tolist())
        for label in self.labels:
            if classes is not None and not 0 <= label < classes:
                raise StepQuantError(f"class label is {label}: expected 0 to {classes - 1}")
        return self.labels

    def describe(self) -> dict[str, Any]:
        """For the record of a checkpoint, as JSON values: prompts as number and SHA-256."""
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
    """One label or several, in whatever holds them."""
    if labels is None:
        return ()
    values = labels.tolist() if isinstance(labels, torch.Tensor | np.ndarray) else labels
    values = list(values) if isinstance(values, Iterable) else [values]
    for value in values:
        if not isinstance(value, int | np.integer):
            raise StepQuantError(f"class label is {value!r}: expected a whole number")
    return tuple(int(value) for value in values)


def _texts(value: Any, chosen: Sequence[int]) -> Any:
    """A text for each of the images `chosen`: the same, or several over and over again."""
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list | tuple) or not all(isinstance(v, str) for v in several):
        return value
    return [several[i % len(several)] for i in chosen] if several else value


def described(value: Any, what: str) -> Any:
    """`value` as JSON values that are equal for equal contents: what is large as its SHA-256.

    Raises StepQuantError, naming `what`, for things that cannot be told apart by their contents.
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
            f"{what} is a {type(value).__name__}, of which a record cannot say what is in it: "
            "expected numbers, texts, tensors, arrays, images, functions, and lists and "
            "dictionaries of these"
        )
    return f"{kind} sha256 {hashlib.sha256(content).hexdigest()}"


def class_count(pipeline: DiffusionPipeline) -> int | None:
    """How many classes the denoiser's config says it was trained for, or None."""
    for name in ("unet", "transformer"):
        config = getattr(getattr(pipeline, name, None), "config", None) or {}
        for key in ("num_embeds_ada_norm", "num_class_embeds"):
            if config.get(key) is not None:
                return int(config[key])
    return None


def takes_prompts(pipeline: DiffusionPipeline) -> bool:
    """Whether `pipeline` draws images of texts."""
    return "prompt" in _parameters(pipeline)


def _parameters(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """The kind of each argument of the pipeline's call."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return {name: parameter.kind for name, parameter in parameters.items() if name != "self"}
