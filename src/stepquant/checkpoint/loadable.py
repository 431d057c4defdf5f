"""Whether diffusers will load again what it saves of a pipeline with classes of the user's own."""

from __future__ import annotations

import sys
from typing import Any

from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES

from stepquant.support.errors import StepQuantError


def check_loadable(pipeline: Any) -> None:
    """Check, before any work, that the components of `pipeline` load again after a save.

    diffusers finds a class of the user's by its module, and looks in that module for the base class
    whose methods load it.

    Raises:
        StepQuantError: the module of a component's class does not have that base class.
    """
    if getattr(pipeline, "saves_denoiser_only", False):
        return
    for name, part in pipeline.components.items():
        kind = type(part)
        bases = [base.__name__ for base in kind.__mro__ if base.__name__ in ALL_IMPORTABLE_CLASSES]
        library = kind.__module__.partition(".")[0]
        if not bases or library in ("diffusers", "diffusers_modules", "transformers", "stepquant"):
            continue
        module = sys.modules.get(kind.__module__)
        if not any(hasattr(module, base) for base in bases):
            raise StepQuantError(
                f"the component '{name}' is a {kind.__name__} of the module '{kind.__module__}', "
                f"which diffusers could not load again: expected {bases[0]} among the names of "
                "that module, where diffusers looks for it; import it there"
            )
