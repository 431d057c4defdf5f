"""What resume must not lose, and what it must see: other outputs, other models, other processes."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from architectures import build
from quantize_runs import SMALL, left, refused, tree
from stepquant.checkpoint import save as saving
from stepquant.pipelines.denoiser_pipeline import DenoiserPipeline
from stepquant.support.atomic import atomic_folder
from stepquant.support.lock import held
from stepquant.verbs import quantize as verb
from stepquant.verbs.fingerprints import model_fingerprint, pipeline_fingerprint
from stepquant.verbs.quantize import quantize

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = {"calibration.trajectories": 2}
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def float_folder(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("float") / "pipeline"
    tiny_pipeline(**SMALL).save_pretrained(folder)
    return folder


def run(model, out, **changes):
    return quantize(model, "minmax", 8, 8, out, 3, FEW, **changes)


def stopped(model, out, monkeypatch):
    """Unfinished work: all of it but the result."""

    def stop(*_, **__):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(verb, "packed_denoiser", stop)
        with pytest.raises(Stopped):
            run(model, out)
    return out.with_name(out.name + ".work")


def empty(out):
    out.mkdir()


def of_somebody(out):
    out.mkdir()
    (out / "thesis.tex").write_text("dear")


def a_file(out):
    out.write_text("dear")


def a_dead_link(out):
    out.symlink_to(out.with_name("nowhere"))


@pytest.mark.parametrize("made", [empty, of_somebody, a_file, a_dead_link])
def test_an_output_that_something_else_made_is_refused_before_any_work(
    float_folder, tmp_path, monkeypatch, made
):
    out = tmp_path / "out"
    work = stopped(float_folder, out, monkeypatch)
    before = tree(work)
    made(out)
    monkeypatch.setattr(verb, "begin_session", lambda *_: pytest.fail("worked"))
    sentence = refused(lambda: run(float_folder, out, resume=True))
    assert "exists and is not the result of the unfinished work" in sentence
    assert tree(work) == before


def test_the_result_of_another_job_is_refused_and_the_work_goes_on_without_it(
    float_folder, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    quantize(float_folder, "minmax", 4, 8, out, 3, FEW)
    other = tree(out)
    out.rename(tmp_path / "other")
    stopped(float_folder, out, monkeypatch)
    (tmp_path / "other").rename(out)
    assert "is not the result" in refused(lambda: run(float_folder, out, resume=True))
    assert tree(out) == other
    shutil.rmtree(out)
    run(float_folder, out, resume=True)
    run(float_folder, tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")
    assert left(tmp_path) == ["out", "whole"]


def test_a_result_that_was_changed_after_the_kill_is_refused(float_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stop(self):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("stepquant.support.work_folder.WorkFolder.remove", stop)
        with pytest.raises(Stopped):
            run(float_folder, out)
    whole = tree(out)
    scheduler = out / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text() + "\n")
    assert "is not the result" in refused(lambda: run(float_folder, out, resume=True))
    scheduler.write_bytes(whole["scheduler/scheduler_config.json"])
    run(float_folder, out, resume=True)
    assert tree(out) == whole and left(tmp_path) == ["out"]


def test_on_a_full_disk_the_sentence_says_that_the_work_is_kept(
    float_folder, tmp_path, monkeypatch
):
    out = tmp_path / "out"

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "_forget_origin", full)
        sentence = refused(lambda: run(float_folder, out))
    assert "no space left on the disk" in sentence and "nothing" not in sentence
    assert f"the finished work is kept in '{out}.work', continue with --resume" in sentence
    assert left(tmp_path) == ["out.work"]
    run(float_folder, out, resume=True)
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("act_fn", "relu"), ("norm_eps", 1e-2), ("freq_shift", 1), ("downsample_padding", 0)],
)
def test_a_model_with_another_config_is_another_job(
    float_folder, tmp_path, monkeypatch, key, value
):
    model, out = tmp_path / "float", tmp_path / "out"
    shutil.copytree(float_folder, model)
    stopped(model, out, monkeypatch)
    path = model / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert "holds the work of another job" in refused(lambda: run(model, out, resume=True))


def test_every_component_of_the_calibration_is_part_of_the_job(tmp_path):
    build("sd").save_pretrained(tmp_path / "sd")

    def found():
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "sd")
        return json.dumps(pipeline_fingerprint(pipeline, "unet"), sort_keys=True)

    known = [found()]
    assert found() == known[0]
    text = next((tmp_path / "sd" / "text_encoder").glob("*.safetensors"))
    for file in (text, tmp_path / "sd" / "vae" / WEIGHTS):
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, file, {"format": "pt"})
        known.append(found())
    for name, key, value in (
        ("vae", "scaling_factor", 0.5),
        ("text_encoder", "hidden_act", "relu"),
    ):
        path = tmp_path / "sd" / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        known.append(found())
    path = tmp_path / "sd" / "tokenizer" / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(values))
    known.append(found())
    assert [known.index(each) for each in known] == list(range(len(known)))


def test_a_module_without_a_config_is_known_by_its_modules():
    def model(act, eps):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4, eps=eps), act)

    prints = [
        json.dumps(model_fingerprint(model(act, eps)))
        for act, eps in ((nn.SiLU(), 1e-5), (nn.ReLU(), 1e-5), (nn.SiLU(), 1e-3))
    ]
    assert len(set(prints)) == 3
    assert json.dumps(model_fingerprint(model(nn.SiLU(), 1e-5))) == prints[0]
    pipeline = DenoiserPipeline(model(nn.SiLU(), 1e-5), (1, 8, 8))
    assert pipeline_fingerprint(pipeline, "denoiser")["components"] == {}


def test_a_damaged_piece_is_refused_and_computed_again_once_deleted(
    float_folder, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    work = stopped(float_folder, out, monkeypatch)
    for name in ("ranges", "trajectories"):
        piece = work / f"{name}.safetensors"
        content = bytearray(piece.read_bytes())
        content[-1] ^= 1
        piece.write_bytes(content)
        sentence = refused(lambda: run(float_folder, out, resume=True))
        assert f"'{piece}' has the SHA-256" in sentence or "ranges" in sentence
        piece.unlink()
    run(float_folder, out, resume=True)
    run(float_folder, tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


def test_two_processes_do_not_share_the_work(float_folder, tmp_path):
    out = tmp_path / "out"
    with held(tmp_path / "out.work"):
        for resume in (False, True):
            sentence = refused(lambda: run(float_folder, out, resume=resume))  # noqa: B023
            assert sentence.startswith(f"'{out}.work' is in use by process ")
    assert left(tmp_path) == []
    run(float_folder, out)


def test_leaving_the_work_folder_to_another_user_path(float_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run(float_folder, "~/out")
    assert left(tmp_path) == ["out"]
    assert "exists: expected a new one" in refused(lambda: run(float_folder, Path("~/out")))


def test_another_run_with_wildcards_in_its_name_harms_nobody(float_folder, tmp_path):
    with atomic_folder(tmp_path / "Xmas"):
        run(float_folder, tmp_path / "X*")
    assert left(tmp_path) == ["X*", "Xmas"]


def test_import_of_the_lock_needs_no_torch():
    code = "import sys, stepquant.support.lock; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
