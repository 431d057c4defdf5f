"""The digests of a folder's files: written by `quantize`, compared by `load`, by nobody else."""

from __future__ import annotations

import json
import shutil

import pytest
from diffusers import DDPMPipeline, DiffusionPipeline
from huggingface_hub.errors import EntryNotFoundError

from packed_models import packed_pipeline
from quantize_runs import refused
from stepquant.checkpoint import file_sums, load
from stepquant.checkpoint.file_sums import SUMS_NAME, check_sums, file_digests, write_sums
from stepquant.checkpoint.load import load_pipeline
from stepquant.checkpoint.save import save_pipeline

SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(packed_pipeline(), "unet", tmp_path_factory.mktemp("saved") / "pipeline")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_they_cover_what_no_checksum_covers(folder):
    sums = json.loads((folder / SUMS_NAME).read_text())
    digests = file_digests(folder)
    assert sums.keys() == {"model_index.json", SCHEDULER}
    assert all(digests[name] == wanted for name, wanted in sums.items())
    assert set(digests) > set(sums) | {SUMS_NAME}


def test_they_leave_out_what_people_edit(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copied")
    (copied / ".git").mkdir()
    for name in ("README.md", ".gitattributes", ".git/HEAD", "scheduler/.cache"):
        (copied / name).write_text("x")
    write_sums(copied)
    sums = json.loads((copied / SUMS_NAME).read_text())
    assert sums.keys() == {"model_index.json", SCHEDULER}


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("values", [{"beta_end": 0.01}, {"clip_sample": False}, {"x": 1}])
def test_a_changed_scheduler_is_named(copy, values):
    edit(copy / SCHEDULER, **values)
    sentence = refused(lambda: load_pipeline(copy))
    assert sentence.startswith(f"'{copy / SCHEDULER}' has the SHA-256 ")
    assert "one of the two is damaged or was changed" in sentence
    assert f"delete '{copy / SUMS_NAME}' if you have changed the folder yourself" in sentence
    (copy / SUMS_NAME).unlink()
    load_pipeline(copy)


def test_a_missing_file_is_named(copy):
    (copy / SCHEDULER).unlink()
    assert f"has no file '{SCHEDULER}'" in refused(lambda: check_sums(copy))


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"model_index.json": 3}'])
def test_sums_that_are_none_are_named(copy, text):
    (copy / SUMS_NAME).write_text(text)
    assert SUMS_NAME in refused(lambda: load_pipeline(copy))


def test_folders_without_them_load_as_ever(folder, tmp_path):
    pipeline = load_pipeline(folder)
    pipeline.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / SUMS_NAME).exists()
    load_pipeline(tmp_path / "again")
    DDPMPipeline.from_pretrained(folder)


def test_a_file_that_cannot_be_read_is_named(copy, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(file_sums.Path, "open", forbidden)
    assert "cannot be read (Permission denied)" in refused(lambda: check_sums(copy))


def hub(monkeypatch, folder, cache, missing=()):
    """A hub with the one repository `folder`, of which diffusers fetches all but `missing`."""
    snapshot = cache / "models--org--name" / "snapshots" / ("0" * 40)
    fetched = []

    def download(*_, **__):
        shutil.copytree(folder, snapshot, ignore=lambda *_: [SUMS_NAME, *missing])
        return str(snapshot)

    def one(source, name, revision):
        assert (source, revision) == ("org/name", snapshot.name)
        fetched.append(name)
        if not (folder / name).is_file():
            raise EntryNotFoundError(f"no {name}")
        shutil.copyfile(folder / name, snapshot / name)
        return str(snapshot / name)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.setattr(load, "hf_hub_download", one)
    return fetched


def test_they_are_fetched_from_the_hub(copy, tmp_path, monkeypatch):
    fetched = hub(monkeypatch, copy, tmp_path)
    load_pipeline("org/name")
    assert fetched == [SUMS_NAME]


def test_what_differs_on_the_hub_is_told(copy, tmp_path, monkeypatch):
    (copy / SCHEDULER).write_text((copy / SCHEDULER).read_text() + " ")
    hub(monkeypatch, copy, tmp_path)
    assert SCHEDULER in refused(lambda: load_pipeline("org/name"))


def test_digests_that_cannot_be_read_are_told_of_the_hub_too(copy, tmp_path, monkeypatch):
    (copy / SUMS_NAME).write_text("[]")
    hub(monkeypatch, copy, tmp_path)
    assert refused(lambda: load_pipeline("org/name")).endswith("changed the folder yourself")


def test_a_file_that_diffusers_does_not_fetch_is_fetched_if_it_lies_in_the_repository(
    copy, tmp_path, monkeypatch
):
    (copy / "unet" / "notes.txt").write_text("a note")
    sums = json.loads((copy / SUMS_NAME).read_text())
    sums |= {"unet/notes.txt": file_digests(copy)["unet/notes.txt"], "../../out.txt": "0"}
    (copy / SUMS_NAME).write_text(json.dumps(sums))
    fetched = hub(monkeypatch, copy, tmp_path, ["notes.txt"])
    assert "'../../out.txt'" in refused(lambda: load_pipeline("org/name"))
    assert fetched == [SUMS_NAME, "unet/notes.txt"]


def test_a_model_on_the_hub_without_them_loads(copy, tmp_path, monkeypatch):
    (copy / SUMS_NAME).unlink()
    assert hub(monkeypatch, copy, tmp_path) == []
    load_pipeline("org/name")
