"""peft learns of quantized layers whichever package is imported first, and imports stay light."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("peft", reason="diffusers' LoRA calls need peft, which is not installed")

USE = """
import torch
from torch import nn
from stepquant.runtime.layers.weight_only import weight_only_in_place_of
net = nn.Sequential(weight_only_in_place_of(nn.Linear(4, 4)), nn.Conv2d(1, 1, 1))
peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0", "1"]), net, "a")
print(type(net[0]).__name__, type(net[1]).__name__)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "first", ["import peft\nimport stepquant", "import stepquant\nimport peft"], ids=["peft", "own"]
)
def test_either_package_comes_first(first: str) -> None:
    assert run(first + USE) == "LoraOnLinear Conv2d"


def test_the_registration_does_not_import_peft() -> None:
    code = "import sys, stepquant; print('peft' in sys.modules)"
    assert run(code) == "False"
