"""Committed checkpoints with hand-written codes still load and compute the same numbers.

Uniform bits. Weights of `linear`, (code - zero point) * scale: first part [[-.5, 0, .5],
[-.25, 0, .25]], second part [[0], [14]]. Its input [1, 4, 6, .6] divided by [1, 2, 4, 1] is
[1, 2, 1.5, .6]. At timestep 10 (scales .5 and .25) it rounds to [1, 2, 1.5, .5], so
y = [1.25, 6.125]. At timestep 900 (scales 1 and 2) it rounds to [1, 2, 2, 0], so y = [1.5, -.75].
`conv` [5, 0, -5] over y rounded to halves, [1, 6] and [1.5, -1], padded with zeros: [-30, 5] and
[5, 7.5]. `gain` doubles both.

Mixed bits, zero points in half steps. First part [[-.75, -.25, .25], [1, -1, 1]], second part
[[0], [-2]]. At timestep 10, y = [.625, -1.5], rounded to halves [.5, -1.5], so `conv` gives
[7.5, 2.5]. At timestep 900, y = [.75, 0], rounded (1.5 to 2) to [1, 0]: [0, 5].
"""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file
from torch import nn

import stepquant  # noqa: F401  registers with diffusers
from stepquant.engines.backend import set_backend

GOLDEN = Path(__file__).parent / "golden"
SAMPLE = torch.tensor([[1.0, 4.0, 6.0, 0.6]])
AT_10 = torch.tensor([[-60.0, 10.0]])
AT_900 = torch.tensor([[10.0, 15.0]])
MIXED_AT_10 = torch.tensor([[15.0, 5.0]])
MIXED_AT_900 = torch.tensor([[0.0, 10.0]])
UNIFORM_WEIGHT = torch.tensor([[-0.5, 0.0, 0.5, 0.0], [-0.25, 0.0, 0.25, 14.0]])
MIXED_WEIGHT = torch.tensor([[-0.75, -0.25, 0.25, 0.0], [1.0, -1.0, 1.0, -2.0]])


class GoldenDenoiser(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.conv = nn.Conv2d(1, 1, (1, 3), padding=(0, 1), bias=False)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        hidden = self.linear(sample)
        return self.conv(hidden.view(-1, 1, 1, 2)).flatten(1) * self.gain


@pytest.fixture(params=["uniform", "mixed"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(kind) -> GoldenDenoiser:
    return GoldenDenoiser.from_pretrained(GOLDEN / kind)


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [
        (10, {"uniform": AT_10, "mixed": MIXED_AT_10}),
        (0.0, {"uniform": AT_10, "mixed": MIXED_AT_10}),
        (900, {"uniform": AT_900, "mixed": MIXED_AT_900}),
        (1000, {"uniform": AT_900, "mixed": MIXED_AT_900}),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_outputs_are_the_hand_written_numbers(model, kind, backend, timestep, expected):
    set_backend(model, backend)
    assert torch.equal(model(SAMPLE, timestep), expected[kind])


def test_samples_at_different_steps_in_one_batch(model, kind):
    y = model(SAMPLE.repeat(3, 1), torch.tensor([900, 10, 900]))
    at_10, at_900 = (AT_10, AT_900) if kind == "uniform" else (MIXED_AT_10, MIXED_AT_900)
    assert torch.equal(y, torch.cat([at_900, at_10, at_900]))


def test_weights_are_the_hand_written_numbers(model, kind):
    expected = {"uniform": UNIFORM_WEIGHT, "mixed": MIXED_WEIGHT}[kind]
    assert torch.equal(model.linear.float_weight(), expected)
    assert torch.equal(model.conv.float_weight(), torch.tensor([[[[5.0, 0.0, -5.0]]]]))


def test_saving_again_keeps_every_tensor_and_the_config(model, kind, tmp_path):
    model.save_pretrained(tmp_path)
    name = "diffusion_pytorch_model.safetensors"
    golden, again = load_file(GOLDEN / kind / name), load_file(tmp_path / name)
    assert golden.keys() == again.keys()
    for key, tensor in golden.items():
        assert torch.equal(tensor, again[key]) and tensor.dtype == again[key].dtype, key
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["layers"].keys() == {"linear", "conv"}
    assert config["provenance"] == {"seed": 0}


def test_reader_in_the_format_document_reads_it(model, kind):
    document = (
        Path(__file__).parents[2] / "docs" / "reference" / "checkpoint-format.md"
    ).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)
    reader: dict = {}
    exec(code, reader)
    weights = reader["read_weights"](GOLDEN / kind, {"linear": (2, 4), "conv": (1, 1, 1, 3)})
    assert weights.keys() == {"linear", "conv"}
    for name, weight in weights.items():
        assert torch.equal(torch.from_numpy(weight), getattr(model, name).float_weight())
