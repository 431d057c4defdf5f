"""What a step of a recipe is."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from stepquant.scheme import Scheme
from stepquant.session import Session


class Step(BaseModel):
    """Typed hyper-parameters and one method. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: ClassVar[str]
    needs_ranges: ClassVar[bool] = True  # otherwise it must come before every step that does

    def check(self, scheme: Scheme) -> None:
        """An error where the step cannot work with `scheme`; asked before anything is computed."""

    def apply(self, session: Session) -> None:
        """Change `session.model`, and say in `session.summary` what was done."""
        raise NotImplementedError
