import subprocess
import sys

import pytest
import torch

import stepquant.evaluation
from stepquant.evaluation import frechet_metric, paired_psnr, paired_ssim
from stepquant.support.errors import StepQuantError

IMAGES = torch.zeros(2, 1, 16, 16)


def test_torchmetrics_is_not_imported_before_it_is_used():
    code = (
        "import sys, stepquant.evaluation\n"
        "from stepquant.evaluation import *\n"
        "measure_latency({'a': int}, 1, 0)\n"
        "assert load_features.__name__ == 'load_features'\n"
        "print('torchmetrics' in sys.modules)\n"
        "frechet_metric(2)\n"
        "print('torchmetrics' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("name", stepquant.evaluation.__all__)
def test_every_public_name_is_there(name):
    assert getattr(stepquant.evaluation, name).__module__.startswith("stepquant.evaluation.")
    assert name in dir(stepquant.evaluation)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'stepquant\.evaluation' has no attribute 'fid'"):
        _ = stepquant.evaluation.fid


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: frechet_metric(2), id="frechet"),
        pytest.param(lambda: paired_psnr(IMAGES, IMAGES), id="psnr"),
        pytest.param(lambda: paired_ssim(IMAGES, IMAGES), id="ssim"),
    ],
)
def test_without_torchmetrics_the_error_says_what_to_install(monkeypatch, call):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(StepQuantError, match=r"pip install stepquant\[evaluate\]"):
        call()


def test_another_missing_package_is_not_blamed_on_torchmetrics(monkeypatch):
    from stepquant.evaluation.extra import evaluate_extra

    monkeypatch.setitem(sys.modules, "numpy_of_another_name", None)
    with pytest.raises(ModuleNotFoundError, match="numpy_of_another_name"), evaluate_extra():
        import numpy_of_another_name  # noqa: F401
