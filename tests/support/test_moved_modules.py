"""Old module names import for one release, and say so."""

from __future__ import annotations

import importlib
import sys

import pytest

from stepquant.engines.openvino_denoiser import OpenVinoDenoiser
from stepquant.methods.recipe import Recipe
from stepquant.pipelines.opening import default_conditions
from stepquant.simulation.scheme import Scheme
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter


@pytest.mark.parametrize(
    ("old", "moved"),
    [
        ("stepquant.errors", StepQuantError),
        ("stepquant.progress", Reporter),
        ("stepquant.recipe", Recipe),
        ("stepquant.scheme", Scheme),
        ("stepquant.sources", default_conditions),
        ("stepquant.runtime.openvino_backend", OpenVinoDenoiser),
    ],
)
def test_an_old_name_gives_the_same_objects_and_warns(old, moved):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {moved.__module__}"):
        module = importlib.import_module(old)
    assert getattr(module, moved.__name__) is moved


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"stepquant\.mistakes"):
        importlib.import_module("stepquant.mistakes")
