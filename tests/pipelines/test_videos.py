"""`sample` of a pipeline for videos: float and weight-only, in Python and on the command line."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from architectures import WAN_CALL, wan
from cli_runs import run
from quantize_runs import refused
from stepquant.api import quantize, sample
from stepquant.pipelines.sampling import drawn_in

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos") / "wan"
    wan().save_pretrained(folder)
    return folder


def test_videos_have_frames(folder, tmp_path):
    given = {"prompts": ["a cat", "fog"], "call": WAN_CALL}
    videos = sample(folder, 2, 2, **given)
    assert videos.shape == (2, 5, 3, 16, 16) and videos.dtype == torch.float32
    pipeline = wan()
    pipeline.set_progress_bar_config(disable=True)
    for i, prompt in enumerate(given["prompts"]):
        generator = torch.Generator().manual_seed(i)
        wanted = pipeline(
            prompt, num_inference_steps=2, generator=generator, output_type="np", **WAN_CALL
        ).frames[0]
        torch.testing.assert_close(
            videos[i].movedim(-3, -1), torch.from_numpy(wanted), rtol=0, atol=1e-4
        )
    quantized = quantize(folder, "weight-only", 8, out=tmp_path / "w8").pipeline
    found = sample(quantized, 2, 2, **given)
    assert float((found - videos).abs().mean()) < 0.02


def test_a_result_without_pictures_is_refused():
    assert "the pipeline returned a list: expected one with arrays" in refused(lambda: drawn_in([]))


def test_the_command_line_writes_frames(folder, tmp_path):
    call = [f"--call={name}={value}" for name, value in WAN_CALL.items()]
    where = ["--grid", tmp_path / "grid.png", "--out", tmp_path / "frames"]
    told = run("sample", folder, "--prompt=a cat", "--num=2", "--steps=2", *call, *where)
    assert told.exit_code == 0, told.stderr
    assert len(list((tmp_path / "frames").iterdir())) == 2 * 5
    width, height = Image.open(tmp_path / "grid.png").size
    assert width > 2 * height  # a row of five frames for each video
    assert "frames" in told.stdout
