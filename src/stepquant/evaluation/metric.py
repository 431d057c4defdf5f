"""What a metric is, the registry of all metrics, and how `evaluate` chooses and computes them."""

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

# What `evaluate` computes for everybody, in the order of its record.
DEFAULT = ("paired_psnr", "paired_ssim", "noise_error", "frechet_distance")
HOW_TO = {
    "features": "a feature network; name one with features= or --features",
    "labels": "a model that draws images of classes",
    "prompts": "a model that draws images of prompts",
}


@dataclass(frozen=True)
class Comparison:
    """Two models that drew images from the same seeds: what a metric may use besides the images.

    `candidate` is the model in question, `reference` its float model. `conditioning` says what the
    images are of, `features` is the feature network, if one was named.
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
        """The class of each of the first `count` images; None if they are of no classes."""
        return self.conditioning.arguments(self.reference, 0, count).get("class_labels")

    def prompts(self, count: int) -> list[str] | None:
        """The prompt of each of the first `count` images; None if there are no prompts."""
        return self.conditioning.arguments(self.reference, 0, count).get("prompt")


Compute = Callable[[Tensor, Tensor, Comparison], dict[str, Any]]


@dataclass(frozen=True)
class Metric:
    """A function that compares two sets of images, and how tables show its result.

    See `register_metric`.
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
        """The key of the value that tables show."""
        return named(self.key, record)

    def cell(self, record: Mapping[str, Any]) -> tuple[str, Any]:
        """`(heading, value)` of this metric's column in a table with a row for each model."""
        value = record.get(self.key_in(record))
        if self.summary is not None and value is not None:
            value = next(iter(self.summary(value).values()))
        return named(self.column, record), value

    def cell_of_float(self, record: Mapping[str, Any]) -> Any:
        """The same for the float model that `record` compares with; None if it has no value."""
        return None if self.of_float is None else record.get(named(self.of_float, record))


def named(text: str, record: Mapping[str, Any]) -> str:
    """`text` with the name of the feature network for `{features}`."""
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
    """Decorator: make a function known as the metric `name`.

    The function takes `images` and `float_images`, each `[N, C, H, W]` in [0, 1] and paired by
    seed, and a `Comparison`. It returns JSON values by the keys that they get in the record.

    Args:
        name: what `metrics=` and `--metric` call it.
        key: the key of its main value, which tables show.
        better: whether a "higher" or a "lower" value is better.
        column: heading of its column in tables with a row for each model; `key` if not given.
        of_float: the key of the float model's own value, for metrics that have one.
        needs: what it cannot do without: "features", "labels" or "prompts". `evaluate` refuses the
            metric where that is missing, before it samples.
        summary: labels and numbers that tables show in the place of a value that is no number; the
            first one goes into the column.

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
    """The default metrics that have what they need, then those of `names`.

    Raises:
        StepQuantError: one of `names` is unknown, or lacks what it needs.
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
    """What `metric` needs and `comparison` has not."""
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
    """Add to `record` what `metrics` find.

    Raises:
        StepQuantError: a metric gives something other than JSON values by keys that are free.
    """
    for metric in metrics:
        with comparison.reporter.task(f"measuring {metric.name}", total=None):
            found = metric.compute(images, float_images, comparison)
        try:
            json.dumps(found)
        except (TypeError, ValueError) as error:
            raise StepQuantError(
                f"metric '{metric.name}' gives what JSON cannot hold ({error}): expected numbers, "
                "texts and lists by key"
            ) from error
        if not isinstance(found, dict) or found.keys() & record.keys():
            raise StepQuantError(
                f"metric '{metric.name}' gives {found!r}: expected a dictionary without the keys "
                f"that the record has already, {', '.join(record)}"
            )
        record.update(found)


def table_rows(
    record: Mapping[str, Any], metrics: Iterable[Metric], hidden: Iterable[str]
) -> list[dict[str, Any]]:
    """A row with `measure`, `value` and `better` for all in `record` but `hidden`.

    Summaries come last. `better` is empty beside a number that is not a metric's main one.
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
