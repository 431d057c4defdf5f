"""What images are drawn of: prompts, class labels, guidance; and how a pipeline takes it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline

from stepquant.errors import StepQuantError


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
        labels: int | Sequence[int] | None = None,
        guidance: float | None = None,
        call: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """From what a user gives: one or several."""
        prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts or ())
        labels = (labels,) if isinstance(labels, int) else tuple(labels or ())
        return cls(prompts, labels, guidance, dict(call or {}))

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
        found: dict[str, Any] = dict(self.call)
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
            found["call"] = {name: repr(value) for name, value in sorted(self.call.items())}
        return found


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
