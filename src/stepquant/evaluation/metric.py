"""The type and the registry of metrics, and how `evaluate` chooses and computes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from torch import Tensor

from stepquant.support.errors import StepQuantError
from stepquant.support.registry import Registry

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from stepquant.evaluation.features import FeatureExtractor
    from stepquant.pipelines.conditioning import Conditioning
    from stepquant.support.progress import Reporter

Better = Literal["higher", "lower"]
Need = Literal["features", "labels", "prompts"]

# Metrics that `evaluate` computes by default, in the order of its record.
DEFAULT = ("paired_psnr", "paired_ssim", "noise_error", "frechet_distance")
HOW_TO = {
    "features": "a feature network; name one with features= or --features",
    "labels": "a model that draws images of classes",
    "prompts": "a model that draws images of prompts",
}


@dataclass(frozen=True)
class Comparison:
    """Context of a metric: the two models that drew the images, and how they were sampled.

    Attributes:
        candidate: the pipeline under evaluation, usually a quantized one.
        reference: its float pipeline.
        steps: sampling steps of both.
        scheduler: the sampler's name, or None for the pipeline's own.
        seed: seed of the first image; both models use the same seeds.
        conditioning: prompts, labels and guidance of the images.
        reporter: where progress is shown.
        features: the feature network, or None if the user named none.
    """

    candidate: DiffusionPipeline
    reference: DiffusionPipeline
    steps: int
    scheduler: str | None
    seed: int
    conditioning: Conditioning
    reporter: Reporter
    features: FeatureExtractor | None = None

    def labels(self, count: int) -> list[int] | None:
        """Class numbers of the first `count` images; None for a model without class labels."""
        return self.conditioning.arguments(self.reference, 0, count).get("class_labels")

    def prompts(self, count: int) -> list[str] | None:
        """Prompts of the first `count` images; None for a model without prompts."""
        return self.conditioning.arguments(self.reference, 0, count).get("prompt")


Compute = Callable[[Tensor, Tensor, Comparison], dict[str, Any]]


@dataclass(frozen=True)
class Metric:
    """A function that compares two sets of images, and how tables show its result.

    `register_metric` describes the fields.
    """

    name: str
    compute: Compute
    key: str
    column: str
    better: Better
    of_float: str | None
    needs: tuple[Need, ...]
    summary: Callable[[Any], dict[str, Any]] | None

    def key_in(self, record: Mapping[str, Any]) -> str:
        """Key of the main value in `record`."""
        return named(self.key, record)

    def cell(self, record: Mapping[str, Any]) -> tuple[str, Any]:
        """`(heading, value)` of this metric's column in a table with one row per model."""
        value = record.get(self.key_in(record))
        if self.summary is not None and value is not None:
            value = next(iter(self.summary(value).values()))
        return named(self.column, record), value

    def cell_of_float(self, record: Mapping[str, Any]) -> Any:
        """The float model's value for the same column; None if the metric has none."""
        return None if self.of_float is None else record.get(named(self.of_float, record))


def named(text: str, record: Mapping[str, Any]) -> str:
    """`text` with `{features}` replaced by the name of the feature network."""
    return text.replace("{features}", str(record.get("features")))


METRICS: Registry[Metric] = Registry("metric", "stepquant.metrics", "stepquant.evaluation.metrics")

AnyCompute = TypeVar("AnyCompute", bound=Compute)


def register_metric(
    name: str,
    *,
    key: str,
    better: Better,
    column: str | None = None,
    of_float: str | None = None,
    needs: tuple[Need, ...] = (),
    summary: Callable[[Any], dict[str, Any]] | None = None,
) -> Callable[[AnyCompute], AnyCompute]:
    """Decorator that registers a function as the metric `name`.

    The function takes `images` and `float_images`, each `[N, C, H, W]` in [0, 1] and paired by
    seed, and a `Comparison`. It returns a dictionary of JSON values that `evaluate` adds to its
    record.

    Args:
        name: the name in `metrics=` and `--metric`.
        key: the key of the main value, which tables show.
        better: whether a "higher" or a "lower" value is better.
        column: heading of the column in tables with one row per model; `key` by default.
        of_float: the key of the float model's own value, if the metric computes one.
        needs: required inputs: "features", "labels" or "prompts". Without them, `evaluate` leaves a
            default metric out, and refuses one that the user named before it samples.
        summary: for a main value that is not a number: labels and numbers that tables show instead.
            The first number goes into the column.

    `key`, `column` and `of_float` may contain `{features}`, the name of the feature network.

    Raises:
        StepQuantError: an argument is not as described, or the name is taken.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise StepQuantError(
            f"the name of a metric is {name!r}: expected a word of lower-case letters, digits and "
            "underscores"
        )
    if better not in get_args(Better) or not set(needs) <= HOW_TO.keys():
        raise StepQuantError(
            f"metric '{name}' has better={better!r} and needs={needs!r}: expected 'higher' or "
            f"'lower', and a tuple of some of {', '.join(HOW_TO)}"
        )

    def register(compute: AnyCompute) -> AnyCompute:
        metric = Metric(name, compute, key, column or key, better, of_float, needs, summary)
        METRICS.register(name, metric, compute)
        return compute

    return register


def chosen_metrics(names: Iterable[str], comparison: Comparison) -> list[Metric]:
    """The default metrics whose needs are met, then the metrics of `names`.

    Raises:
        StepQuantError: one of `names` is unknown, or `comparison` lacks an input that it needs.
    """
    chosen = [METRICS[name] for name in DEFAULT]
    chosen = [metric for metric in chosen if not missing(metric, comparison)]
    for metric in map(METRICS.find, names):
        lacking = missing(metric, comparison)
        if lacking:
            raise StepQuantError(
                f"metric '{metric.name}' lacks its {lacking[0]}: expected {HOW_TO[lacking[0]]}"
            )
        if metric not in chosen:
            chosen.append(metric)
    return chosen


def missing(metric: Metric, comparison: Comparison) -> list[Need]:
    """The inputs that `metric` needs and `comparison` lacks."""
    has = {
        "features": lambda: comparison.features,
        "labels": lambda: comparison.labels(1),
        "prompts": lambda: comparison.prompts(1),
    }
    return [need for need in metric.needs if not has[need]()]


def measure(
    metrics: Iterable[Metric],
    images: Tensor,
    float_images: Tensor,
    comparison: Comparison,
    record: dict[str, Any],
) -> None:
    """Compute `metrics` and add their values to `record`.

    Args:
        metrics: the metrics, in the order of their keys in the record.
        images: `[N, C, H, W]` in [0, 1], of the candidate.
        float_images: `[N, C, H, W]` in [0, 1], of the reference, from the same seeds.
        comparison: the models and how they were sampled.
        record: changed in place.

    Raises:
        StepQuantError: a metric returns something other than a dictionary of JSON values, or a key
            that the record already has.
    """
    for metric in metrics:
        found = metric.compute(images, float_images, comparison)
        try:
            json.dumps(found)
        except (TypeError, ValueError) as error:
            raise StepQuantError(
                f"metric '{metric.name}' returned a value that JSON cannot express ({error}): "
                "expected a dictionary of numbers, texts and lists"
            ) from error
        if not isinstance(found, dict) or found.keys() & record.keys():
            raise StepQuantError(
                f"metric '{metric.name}' returned {found!r}: expected a dictionary with none of "
                f"the keys that the record already has, {', '.join(record)}"
            )
        record.update(found)


def table_rows(
    record: Mapping[str, Any], metrics: Iterable[Metric], hidden: Iterable[str]
) -> list[dict[str, Any]]:
    """Table rows with `measure`, `value` and `better` for the keys of `record` not in `hidden`.

    Summaries come last. `better` is empty for a value that is not the main one of a metric.
    """
    plain = {key: value for key, value in record.items() if key not in hidden}
    better: dict[str, str] = {}
    for metric in metrics:
        key = metric.key_in(record)
        shown: Iterable[str] = (key,)
        if metric.summary is not None and key in plain:
            summary = metric.summary(plain.pop(key))
            plain.update(summary)
            shown = summary
        better.update(dict.fromkeys(shown, metric.better))
    return [
        {"measure": key, "value": value, "better": better.get(key, "")}
        for key, value in plain.items()
    ]
