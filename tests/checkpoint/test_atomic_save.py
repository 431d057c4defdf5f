"""A pipeline folder is either complete or absent."""

import errno
import os
from pathlib import Path

import pytest
import safetensors.torch
from diffusers import DDPMPipeline
from safetensors import SafetensorError

from packed_models import packed_pipeline, unet
from stepquant.checkpoint.folder import check_folder
from stepquant.checkpoint.save import save_pipeline
from stepquant.support.errors import StepQuantError

NO_SPACE = "no space left on the disk while writing '.*out': no part of that folder was kept"


@pytest.fixture(scope="module")
def pipeline():
    return packed_pipeline()


def fail_after(calls, error):
    """A stand-in for a function: works `calls` times less one, then raises `error`."""
    left = calls

    def call(*args, **kwargs):
        nonlocal left
        left -= 1
        if not left:
            raise error

    return call


@pytest.mark.parametrize("calls", [1, 3, 6])
@pytest.mark.parametrize(
    ("error", "raised", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StepQuantError, NO_SPACE),
        (OSError(errno.EIO, "Input/output error"), StepQuantError, "not be written .Input/output"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["disk full", "disk broken", "interrupt"],
)
def test_failure_while_flushing_leaves_nothing(
    pipeline, tmp_path, monkeypatch, calls, error, raised, sentence
):
    monkeypatch.setattr(os, "fsync", fail_after(calls, error))
    with pytest.raises(raised, match=sentence):
        save_pipeline(pipeline, "unet", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "raised", "sentence"),
    [
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            StepQuantError,
            NO_SPACE,
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["disk full", "interrupt"],
)
def test_failure_while_writing_weights_leaves_nothing(
    pipeline, tmp_path, monkeypatch, error, raised, sentence
):
    monkeypatch.setattr(safetensors.torch, "save_file", fail_after(1, error))
    with pytest.raises(raised, match=sentence):
        save_pipeline(pipeline, "unet", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_folder_appears_only_when_everything_is_flushed(pipeline, tmp_path, monkeypatch):
    out = tmp_path / "out"
    seen, flush = [], os.fsync

    def watch(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append((path, out.exists()))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    save_pipeline(pipeline, "unet", out)
    check_folder(out)
    *inside, last = seen
    assert last == (tmp_path, True)
    assert not any(existed for _, existed in inside)
    flushed = {path.name for path, _ in inside}
    assert {path.name for path in out.rglob("*")} <= flushed


def test_existing_folder_is_refused_and_untouched(pipeline, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(StepQuantError, match=r"output folder '.*out' exists: expected a new one"):
        save_pipeline(pipeline, "unet", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_folder_that_appears_meanwhile_is_refused(pipeline, tmp_path, monkeypatch):
    out, flush = tmp_path / "out", os.fsync

    def interfere(descriptor):
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("keep")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", interfere)
    with pytest.raises(StepQuantError, match=r"'.*out' appeared while it was being written"):
        save_pipeline(pipeline, "unet", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_parent_that_is_a_file_is_refused(pipeline, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StepQuantError, match="could not be written"):
        save_pipeline(pipeline, "unet", tmp_path / "file" / "out")


def test_missing_parents_are_made(pipeline, tmp_path):
    check_folder(save_pipeline(pipeline, "unet", tmp_path / "a" / "b" / "out"))


def test_component_without_a_config_is_refused(pipeline, tmp_path):
    float_pipeline = DDPMPipeline(unet(), pipeline.scheduler)
    with pytest.raises(StepQuantError, match="'unet' of DDPMPipeline is UNet2DModel without"):
        save_pipeline(float_pipeline, "unet", tmp_path / "out")
    with pytest.raises(StepQuantError, match="'transformer' of DDPMPipeline is NoneType without"):
        save_pipeline(pipeline, "transformer", tmp_path / "out")
