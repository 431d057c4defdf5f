"""What is shown while a verb runs."""

from __future__ import annotations

import pytest
from diffusers.utils import logging
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging as text_logging

from stepquant.cli.session import keep_libraries_silent


@pytest.fixture(autouse=True)
def bars():
    """Bars of downloads, and of nothing else afterwards, as before."""
    verbosity = logging.get_verbosity(), text_logging.get_verbosity()
    before = are_progress_bars_disabled()
    enable_progress_bars()
    yield
    (disable_progress_bars if before else enable_progress_bars)()
    logging.set_verbosity(verbosity[0])
    text_logging.set_verbosity(verbosity[1])


@pytest.mark.parametrize("quiet", [False, True])
def test_bars_of_downloads_are_there_unless_quiet_is_asked_for(quiet):
    keep_libraries_silent(quiet)
    assert are_progress_bars_disabled() is quiet


def test_bars_of_downloads_that_the_user_has_disabled_stay_so():
    disable_progress_bars()
    keep_libraries_silent(False)
    assert are_progress_bars_disabled()
