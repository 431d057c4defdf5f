"""Recipes: a scheme, calibration settings and ordered, typed steps, as YAML or objects."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    field_validator,
    model_serializer,
)

from stepquant.methods import STEPS, Step
from stepquant.models.eligibility import check_patterns
from stepquant.runtime.layers.weight_only import check_weight_only_bits
from stepquant.simulation.scheme import ALL_KEYS, Scheme, without_empty_patterns
from stepquant.support.errors import StepQuantError
from stepquant.support.plugins import PlugIns
from stepquant.support.yaml_text import parse_yaml

SHIPPED = resources.files("stepquant") / "recipes"
# Each entry point NAME names an importable package that contains NAME.yaml.
PLUG_INS = PlugIns("recipe", "stepquant.recipes")

if TYPE_CHECKING:
    from typing_extensions import Self

WEIGHT_ONLY_KIND: Literal["weight-only"] = "weight-only"
SECTIONS = ("scheme", "calibration", "ranges")


class Calibration(BaseModel):
    """Settings of the calibration data, which the float model's own sampler draws.

    The ranges of each sampling step come from the inputs of `batch` images, 64 at most. A smaller
    `batch` takes less memory.

    Attributes:
        trajectories: number of sampled images.
        steps: sampling steps of each image.
        scheduler: name of the scheduler; None or "own" keeps the pipeline's own.
        batch: images sampled at the same time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    trajectories: int = Field(64, ge=1)
    steps: int = Field(50, ge=1)
    scheduler: str | None = "ddim"
    batch: int = Field(64, ge=1)

    @field_validator("scheduler")
    @classmethod
    def _own_is_none(cls, value: str | None) -> str | None:
        return None if value == "own" else value


class Ranges(BaseModel):
    """Search for initial ranges: "minmax", or "mse", which minimizes |error|^2.4."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    weights: Literal["minmax", "mse"] = "mse"
    activations: Literal["minmax", "mse"] = "mse"


class NamedRecipe(BaseModel):
    """Base class of recipes: name, description, and settings with dotted names."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    description: str

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON values with every default resolved, as stored in checkpoints."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The recipe as YAML, which `load_recipe` reads back into an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def override(self, settings: Mapping[str, Any]) -> Self:
        """A copy with `section.key` or `step.key` set, such as `{"block_distillation.batch": 16}`.

        Raises:
            StepQuantError: the recipe has no such setting, or does not accept the value.
        """
        plain = self.model_dump(mode="json", context=ALL_KEYS)
        for dotted, value in settings.items():
            section, _, key = dotted.partition(".")
            places = [plain[section]] if isinstance(plain.get(section), dict) else []
            places += [entry[section] for entry in plain.get("steps", ()) if section in entry]
            if not places or key not in places[0]:
                known = [f"{name}.{field}" for name, fields in _settable(plain) for field in fields]
                raise StepQuantError(
                    f"recipe '{self.name}' has no setting '{dotted}': expected one of "
                    f"{', '.join(known)}"
                )
            for place in places:
                place[key] = value
        found = parse_recipe(plain, f"recipe '{self.name}' with settings")
        assert isinstance(found, type(self))
        return found


class WeightScheme(BaseModel):
    """Bits of the denoiser's weights in a weight-only recipe: 4 or 8.

    `modules_to_not_convert`: names or patterns of modules whose layers stay float.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    weight_bits: int = 4
    modules_to_not_convert: tuple[str, ...] = ()

    @field_validator("modules_to_not_convert", mode="before")
    @classmethod
    def _patterns(cls, value: object) -> tuple[str, ...]:
        return check_patterns(value, "modules_to_not_convert of a weight-only recipe")

    @model_serializer(mode="wrap")
    def _plain(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        return without_empty_patterns(handler(self), info)

    @field_validator("weight_bits", mode="before")
    @classmethod
    def _bits(cls, value: int) -> int:
        return check_weight_only_bits(value, "weight_bits of a weight-only recipe")


class WeightRanges(BaseModel):
    """Ranges of 4-bit weights: "minmax", or "mse", a search that is many times slower."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    weights: Literal["minmax", "mse"] = "minmax"


class WeightOnlyRecipe(NamedRecipe):
    """Weight-only quantization without calibration, see `weight_only.conversion`."""

    kind: Literal["weight-only"] = WEIGHT_ONLY_KIND
    scheme: WeightScheme = WeightScheme()
    ranges: WeightRanges = WeightRanges()


class Recipe(NamedRecipe):
    """Scheme, calibration, initial ranges, and the ordered steps of `stepquant quantize`."""

    scheme: Scheme = Scheme()
    calibration: Calibration = Calibration()
    ranges: Ranges = Ranges()
    steps: tuple[Step, ...] = ()

    @field_validator("steps", mode="before")
    @classmethod
    def _typed(cls, value: Any) -> tuple[Step, ...]:
        if not isinstance(value, list | tuple | None):
            raise StepQuantError(
                f"key 'steps' is {value!r}: expected a list, with a dash before each step"
            )
        steps = tuple(parse_step(entry) for entry in value or ())
        names = [step.name for step in steps]
        for name in names:
            if names.count(name) > 1:
                raise StepQuantError(f"step '{name}' appears twice: expected each step once")
        for before, after in itertools.combinations(steps, 2):
            why = _why_not_after(after, before)
            if why is not None:
                either = _why_not_after(before, after) is not None
                raise StepQuantError(
                    f"step '{after.name}' comes after '{before.name}', {why}: expected "
                    + ("only one of the two" if either else "it earlier; exchange the two")
                )
        for before, after in itertools.pairwise(steps):
            if before.needs_ranges and not after.needs_ranges:
                raise StepQuantError(
                    f"step '{after.name}' comes after '{before.name}', which needs ranges: "
                    "expected it earlier; move it to the front of the recipe"
                )
        return steps

    @field_serializer("steps")
    def _plain(self, steps: tuple[Step, ...]) -> list[dict[str, Any]]:
        return [{step.name: step.model_dump()} for step in steps]


def _settable(plain: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    sections = [(name, plain[name]) for name in SECTIONS if name in plain]
    return sections + [item for entry in plain.get("steps", ()) for item in entry.items()]


def _why_not_after(after: Step, before: Step) -> str | None:
    """The reason why the step `after` must not come after `before`, or None if it may."""
    return after.not_after.get(before.name) or before.not_before.get(after.name)


def parse_step(entry: Any) -> Step:
    """A step from a `Step`, its name, or `{name: {hyper-parameters}}`.

    Raises:
        StepQuantError: the step is unknown, or does not accept its hyper-parameters.
    """
    if isinstance(entry, Step):
        return entry
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise StepQuantError(
            f"step {entry!r} is not understood: expected 'name' or 'name: {{key: value}}'"
        )
    ((name, values),) = entry.items()
    kind = STEPS.find(name)
    if not isinstance(values, dict | None):
        raise StepQuantError(
            f"step '{name}' has the settings {values!r}: expected 'key: value' for each"
        )
    try:
        return kind.model_validate(values or {})
    except ValidationError as error:
        raise StepQuantError(f"step '{name}': {_first(error, kind)}") from error


def parse_recipe(plain: Any, where: str) -> Recipe | WeightOnlyRecipe:
    """A recipe from plain values, as YAML gives them; errors start with `where`.

    Raises:
        StepQuantError: a key or a value is not one of a recipe, or the steps are in a wrong order.
    """
    if not isinstance(plain, dict):
        raise StepQuantError(
            f"{where} holds a {type(plain).__name__}: expected keys such as name and steps"
        )
    kind = WeightOnlyRecipe if plain.get("kind") == WEIGHT_ONLY_KIND else Recipe
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        raise StepQuantError(f"{where}: {_first(error, kind)}") from error


def _first(error: ValidationError, model: type[BaseModel]) -> str:
    """The first error of a validation as one sentence."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, StepQuantError):
        return str(cause)
    key = ".".join(str(part) for part in first["loc"]) or model.__name__
    if first["type"] == "extra_forbidden":
        known = _model_at(model, first["loc"][:-1]).model_fields
        return f"unknown key '{key}', expected one of {', '.join(known)}"
    if first["type"] == "missing":
        return f"key '{key}' is missing"
    return f"key '{key}' is {first['input']!r}: {first['msg'].lower()}"


def _model_at(model: type[BaseModel], place: tuple[int | str, ...]) -> type[BaseModel]:
    """The pydantic model at the location `place` of `model`."""
    for part in place:
        if isinstance(part, str):
            kind = model.model_fields[part].annotation
            kinds = [k for k in (kind, *get_args(kind)) if isinstance(k, type)]
            model = next(k for k in kinds if issubclass(k, BaseModel))
    return model


def recipe_names() -> list[str]:
    """Sorted names of the recipes in stepquant and in installed plug-ins."""
    return sorted({*_shipped(), *PLUG_INS.entries})


def _shipped() -> list[str]:
    return [
        entry.name.removesuffix(".yaml")
        for entry in SHIPPED.iterdir()
        if entry.name.endswith(".yaml")
    ]


def _named(name: str) -> str:
    """The YAML text of the recipe `name`, one of `recipe_names`."""
    if name not in PLUG_INS.entries:
        return (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
    package = PLUG_INS.load(name, "stepquant" if name in _shipped() else None)
    try:
        return (resources.files(package) / f"{name}.yaml").read_text(encoding="utf-8")
    except (OSError, TypeError, UnicodeDecodeError) as error:
        raise PLUG_INS.broken(name, str(error)) from error


def load_recipe(name: str | Path | Recipe | WeightOnlyRecipe) -> Recipe | WeightOnlyRecipe:
    """Load a recipe by its name or from a YAML file; a recipe object is returned as it is.

    Args:
        name: one of `recipe_names`, or a path that ends in `.yaml` or `.yml`.

    Raises:
        StepQuantError: no such recipe or file, or the file is not a valid recipe.
    """
    if isinstance(name, Recipe | WeightOnlyRecipe):
        return name
    text = str(name)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        if not path.is_file():
            raise StepQuantError(f"recipe file '{path}' does not exist: expected a YAML file")
        where = f"recipe file '{path}'"
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StepQuantError(
                f"{where} cannot be read ({error}): expected a YAML file in UTF-8"
            ) from error
    else:
        if text not in recipe_names():
            raise StepQuantError(
                f"unknown recipe '{text}': expected one of {', '.join(recipe_names())}, or a path "
                "that ends in .yaml"
            )
        content = _named(text)
        where = f"recipe '{text}'"
    return parse_recipe(parse_yaml(content, where), where)
