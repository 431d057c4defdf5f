"""Sampling steps within one call of a pipeline are reported, and no bar is shown."""

from __future__ import annotations

import pytest

from stages import Stages
from stepquant.pipelines.opening import open_pipeline
from stepquant.pipelines.sampling import sample_images
from stepquant.pipelines.step_bar import StepBar


@pytest.mark.parametrize(
    ("steps", "wanted"), [([1, 1, 1], [1 / 3, 2 / 3, 1]), ([2, 2], [2 / 3, 1])]
)
def test_updates_give_the_share_and_never_more_than_all(steps, wanted):
    seen = []
    with StepBar(seen.append, total=3) as bar:
        for count in steps:
            bar.update(count)
        bar.set_postfix(loss=1)
    assert seen == pytest.approx(wanted)


def test_iterating_gives_the_share_after_each_step():
    seen = []
    assert list(StepBar(seen.append, iterable=[9, 5], desc="steps", leave=False)) == [9, 5]
    assert seen == [0.5, 1]


def test_steps_without_a_known_number_are_not_reported():
    seen = []
    assert list(StepBar(seen.append, iterable=iter("ab"))) == ["a", "b"]
    assert seen == []


def test_sampling_moves_with_every_step_of_every_batch(capfd):
    pipeline, reporter = open_pipeline("builtin:fashion-ddpm"), Stages()
    capfd.readouterr()
    sample_images(pipeline, 3, 2, batch=2, reporter=reporter)
    assert reporter.seen["sampling 3 images"] == [1, 2, 2, 2.5, 3, 3]
    assert capfd.readouterr() == ("", "")
    assert "progress_bar" not in vars(pipeline)  # the user's own pipeline keeps its bar
