"""The names at the top of the package, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import stepquant
from stepquant import api
from stepquant.weight_only.config import DynamicConfig, WeightOnlyConfig

HEAVY = ("torch", "diffusers", "transformers", "numpy", "pydantic", "matplotlib", "openvino")


def loaded_after(code: str) -> set[str]:
    """Top-level packages that a new Python has loaded after `code`."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", [name for name in stepquant.__all__ if name != "__version__"])
def test_a_public_name_is_that_of_the_api(name):
    assert getattr(stepquant, name) is getattr(api, name)
    assert name in dir(stepquant)


def test_every_name_of_the_api_is_public():
    deprecated = {"pack"}
    assert set(api.__all__) - deprecated | {"__version__"} == set(stepquant.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'stepquant' has no attribute 'quantise'"):
        _ = stepquant.quantise


def test_importing_the_package_loads_nothing_heavy():
    assert not loaded_after("import stepquant") & set(HEAVY)


def test_the_command_lines_help_loads_nothing_heavy():
    code = (
        "from stepquant.cli import app_main\n"
        "sys.argv = ['stepquant', '--help']\n"
        "try:\n    app_main()\nexcept SystemExit as done:\n    assert not done.code\n"
    )
    assert not loaded_after(code) & set(HEAVY)


@pytest.mark.parametrize(
    "order",
    [
        pytest.param("import stepquant\nimport diffusers, transformers\n", id="before"),
        pytest.param("import diffusers.quantizers.auto\nimport stepquant\n", id="after"),
    ],
)
def test_diffusers_and_transformers_find_the_quantizers(order):
    code = order + (
        "from diffusers.quantizers import auto as ours\n"
        "from transformers.quantizers import auto as theirs\n"
        "for auto in (ours, theirs):\n"
        "    for method in ('stepquant_weight_only', 'stepquant_dynamic'):\n"
        "        config = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method].from_dict(\n"
        "            {'quant_method': method, 'bits': 8, 'layers': ['a']})\n"
        "        assert config.quant_method.value == method, config\n"
        "        assert isinstance(config, auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method])\n"
        "        assert auto.AUTO_QUANTIZER_MAPPING[method](config).pre_quantized\n"
        "assert ours.AUTO_QUANTIZER_MAPPING['stepquant'].__name__ == 'StepQuantQuantizer'\n"
    )
    loaded_after(code)


def test_the_registered_methods_are_those_of_the_configs():
    assert set(stepquant._WEIGHT_ONLY_CONFIGS) == {
        kind.method.value for kind in (WeightOnlyConfig, DynamicConfig)
    }


def test_a_pipeline_takes_a_config_for_each_component():
    """diffusers asks of each config whether it is an instance of an entry of its table."""
    code = (
        "import stepquant\n"
        "from diffusers import PipelineQuantizationConfig\n"
        "PipelineQuantizationConfig(quant_mapping={'unet': stepquant.DynamicConfig()})\n"
    )
    loaded_after(code)
