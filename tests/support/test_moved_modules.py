"""Old module names import for one release, and say so."""

from __future__ import annotations

import importlib
import subprocess
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


# In a process of its own: an old name takes the place of a function of the package.
PROGRAM = """
import importlib, runpy, warnings
import stepquant
from stepquant.support.old_module_names import OLD_MODULE_NAMES

function = stepquant.bench
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    try:
        function.set_backend(stepquant, "nothing")
    except AttributeError:
        pass  # a package is no model
assert "is now stepquant.set_backend" in str(seen[0].message), seen

for old, new in OLD_MODULE_NAMES.items():
    if old.endswith("__main__"):
        continue
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        module = importlib.import_module(f"stepquant.{old}")
    ours = [str(each.message) for each in seen if each.category is DeprecationWarning]
    assert any(f"stepquant.{old} is now stepquant.{new.split()[0]}" in each for each in ours), old
    for home in new.split():
        home = importlib.import_module(f"stepquant.{home}")
        name = next(name for name in vars(home) if not name.startswith("_"))
        assert hasattr(module, name), (old, name)
    assert not hasattr(module, "no_such_name"), old

from stepquant.engines.backend import set_backend
assert stepquant.bench.set_backend is set_backend
try:
    stepquant.bench("nowhere", "nowhere")
except stepquant.StepQuantError as error:
    assert "nowhere" in str(error)

from stepquant.runtime.ops.native import build
build.build = lambda: "stopped by the test"
try:
    runpy.run_module("stepquant.runtime.native", run_name="__main__")
except SystemExit as stop:
    assert str(stop) == "no native kernels: stopped by the test"
else:
    raise AssertionError
print("done")
"""


def test_every_old_name_warns_and_has_what_its_new_homes_have():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
