import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from typer.testing import CliRunner

from stepquant.cli import app

TINY = [
    "--steps=2", "--set=calibration.trajectories=2", "--set=block_distillation.iterations=2",
    "--set=block_distillation.samples=16", "--set=block_distillation.batch=4",
]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def float_folder(tmp_path_factory):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(16, 16),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    folder = tmp_path_factory.mktemp("models") / "float"
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packed_folder(float_folder):
    """What `stepquant quantize` writes, and beside it the JSON record and the printed text."""
    folder = float_folder.with_name("packed")
    result = run(
        "quantize", float_folder, "--recipe=dilatequant", "--weights=4", "--activations=8", *TINY,
        "--seed=3", "--out", folder, "--json", folder.with_name("packed.json"),
    )
    assert result.exit_code == 0, result.stderr
    folder.with_name("packed.txt").write_text(result.stdout)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments):
    """The sentence on stderr of a command that must end with exit code 2 and print nothing else."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def record(path):
    def no_constant(text):
        raise AssertionError(f"{text} is not JSON")

    return json.loads(path.read_text(), parse_constant=no_constant)


def tree(folder):
    """The bytes of every file below `folder`, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
