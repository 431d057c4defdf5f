from __future__ import annotations

import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from stepquant.support import safetensors_file
from stepquant.support.errors import StepQuantError
from stepquant.support.safetensors_file import opened


def refused(path, what="") -> str:
    with pytest.raises(StepQuantError) as error, opened(path, what) as file:
        file.get_tensor("a")
    return str(error.value)


def test_a_sound_file_is_read(tmp_path):
    save_file({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    with opened(tmp_path / "a.safetensors") as file:
        assert torch.equal(file.get_tensor("a"), torch.arange(3))


@pytest.mark.parametrize("keep", [0, 7, 8, 30, -1])
def test_a_file_that_is_cut_is_called_damaged(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(3)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert f"'{path}' is not a whole safetensors file" in refused(path, "the weights of 'unet'")


def test_a_file_that_is_absent_or_a_folder_cannot_be_read(tmp_path):
    assert "cannot be read (No such file" in refused(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").mkdir()
    assert "cannot be read (" in refused(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied"), SafetensorError("Permission denied (os error 13)")],
    ids=["error", "text"],
)
def test_a_file_without_permission_is_not_called_damaged(tmp_path, monkeypatch, error):
    def forbidden(*_, **__):
        raise error

    monkeypatch.setattr(safetensors_file, "safe_open", forbidden)
    sentence = refused(tmp_path / "a.safetensors")
    assert "cannot be read (Permission denied" in sentence
    assert "check the path and its permissions" in sentence and "damaged" not in sentence


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_that_is_so_for_a_file_of_the_system(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(3)}, path)
    path.chmod(0)
    assert "cannot be read (Permission denied" in refused(path)
