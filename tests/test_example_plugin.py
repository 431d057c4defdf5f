"""The plug-in in examples/, installed with pip as a user installs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantize_runs import SMALL, tree

EXAMPLE = Path(__file__).parents[1] / "examples" / "stepquant-rounding"
PRELUDE = """
import json, sys
import torch
import stepquant
from stepquant.support.progress import Reporter
torch.set_num_threads(1)
few = {"calibration.trajectories": 2}
def quantize(out, recipe="sigma-delta", settings=few, **changes):
    return stepquant.quantize("float", recipe, out=out, steps=2, settings=settings, **changes)
"""
WITH_IT = """
from stepquant.cli import app_main
from stepquant.methods.recipe import parse_recipe

found = quantize("plain").record
assert found["provenance"]["plug_ins"] == {"stepquant-rounding": "0.1.0"}, found
assert found["summary"]["sigma_delta_rounding"]["moved_share"] > 0.1, found["summary"]

class Interrupting(Reporter):
    def task(self, description, total):
        if description == "observing activations":
            raise KeyboardInterrupt
        return super().task(description, total)

try:
    quantize("resumed", reporter=Interrupting(quiet=True))
    raise AssertionError
except KeyboardInterrupt:
    pass
quantize("resumed", resume=True)

nearest = {**few, "sigma_delta_rounding.carry": 0}
assert quantize("nearest", settings=nearest).record["summary"]["sigma_delta_rounding"] == {
    "moved_share": 0.0
}
from stepquant_rounding.sigma_delta import SigmaDeltaRounding, sigma_delta
step = SigmaDeltaRounding(carry=0)
plain = stepquant.load_recipe("sigma-delta")
steps = (plain.steps[0], step)
quantize("python", recipe=plain.model_copy(update={"steps": steps}))

try:
    steps = ["sigma_delta_rounding", "block_distillation"]
    parse_recipe({"name": "x", "description": "", "steps": steps}, "x")
    raise AssertionError
except stepquant.StepQuantError as error:
    assert "which has rounded the weights" in str(error)

q = torch.full((1, 8), 3.4)
assert sigma_delta(q, torch.tensor([15.0]), 1.0).sum() == q.sum().round()
assert (sigma_delta(q, torch.tensor([15.0]), 0.0) == 3).all()

sys.argv = ["stepquant", "evaluate", "plain", "--against", "float", "--num=2", "--steps=2",
            "--metric", "brightness_shift", "--json", "record.json"]
app_main()
"""
WITHOUT_IT = """
images = stepquant.sample("plain", 1, 2)
assert images.shape == (1, 1, 16, 16)
pipeline = stepquant.load("plain")
step = pipeline.unet.hf_quantizer.quantization_config.recipe["steps"][1]
assert step == {"sigma_delta_rounding": {"carry": 1.0}}, step
for act in (lambda: quantize("again"), lambda: quantize("again", recipe="sigma.yaml")):
    try:
        act()
    except stepquant.StepQuantError as error:
        print(error)
"""


def python(folder: Path, code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new Python in `folder`, with `path` before the packages that it has."""
    source = Path(__file__).parents[1] / "src"
    places = [*map(str, path), str(source)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that pip has installed the plug-in into."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, folder / "source")  # pip builds in the folder that it is given
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *offline]
    target = folder / "packages"
    subprocess.run([*pip, "--target", target, folder / "source"], check=True, timeout=300)
    return target


def test_the_example_is_used_like_a_step_of_stepquant(installed, tiny_pipeline, tmp_path):
    tiny_pipeline(**{**SMALL, "sample_size": 16}).save_pretrained(tmp_path / "float")
    shown = python(tmp_path, WITH_IT, installed).stdout
    assert tree(tmp_path / "resumed") == tree(tmp_path / "plain")
    assert tree(tmp_path / "python") == tree(tmp_path / "nearest") != tree(tmp_path / "plain")
    results = json.loads((tmp_path / "record.json").read_text())["results"]
    assert 0 < results["brightness_shift"] < 1 and "brightness shift" in shown.replace("_", " ")

    (tmp_path / "sigma.yaml").write_text("name: s\ndescription: d\nsteps: [sigma_delta_rounding]\n")
    by_name, by_path = python(tmp_path, WITHOUT_IT).stdout.splitlines()
    assert by_name.startswith("unknown recipe 'sigma-delta': expected one of dilatequant, ")
    assert "unknown step 'sigma_delta_rounding': expected one of weight_dilation, " in by_path
    assert by_path.endswith("a step of another package needs that package installed")
