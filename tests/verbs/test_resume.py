"""Ctrl-C and kill -9: what is kept, and that it ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from quantize_runs import BLOCKS, FAST, RECONSTRUCT, SMALL, left, refused, tree
from stepquant.methods import BlockDistillation
from stepquant.support.progress import Reporter
from stepquant.verbs.quantize import quantize

pytestmark = pytest.mark.usefixtures("one_thread")


class Interrupting(Reporter):
    """Presses Ctrl-C when the bar of `stage` moves for the `after`-th time."""

    def __init__(self, stage: str, after: int):
        super().__init__(quiet=True)
        self.stage, self.after = stage, after

    @contextmanager
    def task(self, description, total):
        with super().task(description, total) as task:
            advance = task.advance

            def press(count=1, note=""):
                advance(count, note)
                if description.startswith(self.stage):
                    self.after -= 1
                    if self.after == 0:
                        raise KeyboardInterrupt

            task.advance = press
            yield task


@pytest.fixture(scope="module")
def float_folder(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("float") / "pipeline"
    tiny_pipeline(**SMALL).save_pretrained(folder)
    return folder


def run(model, out, **changes):
    return quantize(model, "dilatequant", 4, 4, out, 3, FAST, seed=2, **changes)


@pytest.fixture(scope="module")
def uninterrupted(float_folder, tmp_path_factory):
    """Every file of the checkpoint that nothing disturbed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "out"
    run(float_folder, out)
    torch.set_num_threads(before)
    return tree(out)


@pytest.fixture
def trained(monkeypatch):
    """Names of the blocks that are trained from here on."""
    names = []
    train = BlockDistillation._train

    def spy(self, session, name, block, data, generator):
        names.append(name)
        return train(self, session, name, block, data, generator)

    monkeypatch.setattr(BlockDistillation, "_train", spy)
    return names


STAGES = {
    "while sampling": ("sampling", 1, BLOCKS),
    "while observing": ("observing", 2, BLOCKS),
    "while searching ranges": ("searching", 5, BLOCKS),
    "after four blocks": ("distilling", 4, BLOCKS - 4),
    "after the last block": ("distilling", BLOCKS, 0),
}


@pytest.mark.parametrize(("stage", "after", "remaining"), STAGES.values(), ids=STAGES.keys())
def test_after_ctrl_c_the_work_is_there_to_go_on_with(
    float_folder, uninterrupted, trained, tmp_path, stage, after, remaining
):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(float_folder, out, reporter=Interrupting(stage, after))
    assert left(tmp_path) == ["out.work"]
    assert not list((tmp_path / "out.work").rglob("*.partial"))
    assert "continue with --resume" in refused(lambda: run(float_folder, out))
    trained.clear()
    result = run(float_folder, out, resume=True)
    assert len(trained) == remaining
    assert result.record["resumed"] is True
    assert tree(out) == uninterrupted
    assert left(tmp_path) == ["out"]


def test_reconstructed_blocks_come_out_byte_for_byte_too(float_folder, tmp_path):
    def act(name, **changes):
        return quantize(
            float_folder, "q-diffusion", 4, 4, tmp_path / name, 3, RECONSTRUCT, 2, **changes
        )

    act("whole")
    with pytest.raises(KeyboardInterrupt):
        act("out", reporter=Interrupting("reconstructing", 4))
    assert len(left(tmp_path / "out.work" / "block_reconstruction")) == 4
    act("out", resume=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_resuming_after_a_change_of_the_scheduler_is_refused(float_folder, tmp_path):
    """Its trajectories would be those of another sampler."""
    out, model = tmp_path / "out", tmp_path / "float"
    shutil.copytree(float_folder, model)
    with pytest.raises(KeyboardInterrupt):
        run(model, out, reporter=Interrupting("sampling", 1))
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "clip_sample": False}))
    act = lambda: run(model, out, resume=True)  # noqa: E731
    assert "another job: expected the same model, sampler, recipe" in refused(act)


def test_resuming_another_job_is_refused(float_folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(float_folder, out, reporter=Interrupting("sampling", 1))
    act = lambda: quantize(float_folder, "dilatequant", 4, 5, out, 3, FAST, 2, True)  # noqa: E731
    assert "holds the work of another job" in refused(act)
    assert left(tmp_path) == ["out.work"]


def test_resuming_where_nothing_was_begun_is_an_ordinary_run(float_folder, uninterrupted, tmp_path):
    run(float_folder, tmp_path / "out", resume=True)
    assert tree(tmp_path / "out") == uninterrupted


def test_the_leavings_of_an_earlier_kill_are_no_hindrance(float_folder, uninterrupted, tmp_path):
    for name in (".out.work.done", ".out.partial-abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    run(float_folder, tmp_path / "out")
    assert tree(tmp_path / "out") == uninterrupted
    assert left(tmp_path) == ["out"]


def test_a_truncated_piece_is_named_and_computed_again_once_deleted(
    float_folder, uninterrupted, trained, tmp_path
):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(float_folder, out, reporter=Interrupting("distilling", 4))
    piece = sorted((tmp_path / "out.work" / "block_distillation").iterdir())[1]
    piece.write_bytes(piece.read_bytes()[:-7])
    assert f"'{piece}' cannot be read" in refused(lambda: run(float_folder, out, resume=True))
    assert len(left(tmp_path / "out.work")) == 4  # nothing was thrown away
    piece.unlink()
    trained.clear()
    run(float_folder, out, resume=True)
    assert len(trained) == 1 + BLOCKS - 4
    assert tree(out) == uninterrupted


# Forks one child for each point, which runs the job and dies there by SIGKILL. The parent imports
# everything once and computes nothing, so that forking is safe.
DRIVER = """
import fnmatch, json, os, signal, sys, time
from pathlib import Path
import torch
from stepquant.methods import affine_distillation, trajectory_distillation
from stepquant.verbs.quantize import quantize

model, recipe, settings, points = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
torch.set_num_threads(1)
for module in (affine_distillation, trajectory_distillation):
    module.SECONDS_BETWEEN_SAVES = 0


def dying(function, when, pattern, count):
    seen = []

    def call(source, target, *rest):
        seen.extend([1] * fnmatch.fnmatch(str(target), pattern))
        here = len(seen) == count
        if here and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        function(source, target, *rest)
        if here and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "outside":
            time.sleep(0.2)  # for the parent to notice

    return call


for folder, (when, pattern, count) in points.items():
    Path(folder).mkdir()
    pid = os.fork()
    if pid == 0:
        try:
            os.replace = dying(os.replace, when, pattern, count)
            os.rename = dying(os.rename, when, pattern, count)
            quantize(model, recipe, 4, 4, folder + "/out", 3, settings, seed=2)
        finally:
            os._exit(1)
    while when == "outside":
        files = [str(path) for path in Path(folder).rglob("*")]
        if len(fnmatch.filter(files, pattern)) >= count:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    _, status = os.waitpid(pid, 0)
    print(os.WTERMSIG(status), flush=True)
"""
# When the process dies: before or after the `count`-th file of that name takes its place, or from
# outside once there are so many. And how many blocks are left to train (None: it depends).
POINTS = {
    "as the job is written": ("before", "*/job.json", 1, BLOCKS),
    "before the first piece": ("after", "*/job.json", 1, BLOCKS),
    "as the trajectories are written": ("before", "*/trajectories.safetensors", 1, BLOCKS),
    "before the ranges": ("after", "*/trajectories.safetensors", 1, BLOCKS),
    "as the ranges are written": ("before", "*/ranges.safetensors", 1, BLOCKS),
    "before the first block": ("after", "*/ranges.safetensors", 1, BLOCKS),
    "as the third block is written": ("before", "*/block_distillation/*", 3, BLOCKS - 2),
    "after the third block": ("after", "*/block_distillation/*", 3, BLOCKS - 3),
    "from outside, among the ranges": ("outside", "*/trajectories.safetensors", 1, BLOCKS),
    "from outside, among the blocks": ("outside", "*/block_distillation/*.safetensors", 2, None),
    "before the checkpoint has its name": ("before", "*/out", 1, 0),
    "before the work is removed": ("before", "*/.out.work.done", 1, 0),
}


def kill(model, recipe, settings, points, root):
    """A folder in `root` for each of `points`, as a process that was killed there left it."""
    folders = {name: root / f"{index:02d}" for index, name in enumerate(points)}
    places = {str(folders[name]): point[:3] for name, point in points.items()}
    process = subprocess.run(
        [sys.executable, "-c", DRIVER, model, recipe, json.dumps(settings), json.dumps(places)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["9"] * len(points), process.stderr
    return folders


@pytest.fixture(scope="module")
def killed(float_folder, tmp_path_factory):
    """The folders of `POINTS`."""
    return kill(float_folder, "dilatequant", FAST, POINTS, tmp_path_factory.mktemp("killed"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("name", "remaining"), [(n, p[3]) for n, p in POINTS.items()])
def test_after_a_kill_the_checkpoint_comes_out_byte_for_byte(
    float_folder, killed, uninterrupted, trained, name, remaining
):
    folder = killed[name]
    ended = name == "before the work is removed"
    assert (folder / "out.work").exists()
    assert (folder / "out").exists() == ended
    run(float_folder, folder / "out", resume=True)
    assert tree(folder / "out") == uninterrupted
    assert left(folder) == ["out"]
    if remaining is None:
        assert 0 < len(trained) <= BLOCKS - 2
    else:
        assert len(trained) == remaining


SHORT = {"calibration.trajectories": 2, "ranges.weights": "minmax", "ranges.activations": "minmax"}
OTHER_RECIPES = {
    "mpq-dm": (
        {
            **SHORT,
            "outlier_mixed_bits.samples": 4,
            "low_rank_adapters.rank": 2,
            "relation_distillation.rounds": 3,
            "relation_distillation.batch": 2,
        },
        {
            "after the bits are mixed": ("after", "*/outlier_mixed_bits.safetensors", 1),
            "as the second round is written": ("before", "*/relation_distillation.safetensors", 2),
            "after the second round": ("after", "*/relation_distillation.safetensors", 2),
            "before the checkpoint has its name": ("before", "*/out", 1),
        },
    ),
    str(Path(__file__).parents[1] / "recipes" / "allocated.yaml"): (
        {
            **SHORT,
            "bit_allocation.samples": 3,
            "low_rank_adapters.rank": 2,
            "trajectory_distillation.rounds": 4,
            "trajectory_distillation.batch": 2,
        },
        {
            "after the image's gradients": ("after", "*/image_gradients.safetensors", 1),
            "as the errors are written": ("before", "*/bit_allocation.safetensors", 1),
            "after the bits are allocated": ("after", "*/bit_allocation.safetensors", 1),
            "after the second round": ("after", "*/trajectory_distillation.safetensors", 2),
            "in the self-sampled rounds": ("after", "*/trajectory_distillation.safetensors", 3),
            "before the checkpoint has its name": ("before", "*/out", 1),
        },
    ),
    "stepquant": (
        {
            **SHORT,
            "block_distillation.iterations": 2,
            "block_distillation.samples": 16,
            "block_distillation.batch": 4,
            "block_distillation.steps_together": 2,
            "affine_distillation.iterations": 3,
            "affine_distillation.samples": 16,
            "affine_distillation.batch": 4,
            "affine_distillation.steps_together": 2,
        },
        {
            "in the first step": ("after", "*/block_distillation/*", 2),
            "after the image's gradients": ("after", "*/image_gradients.safetensors", 1),
            "as the first iteration is written": ("before", "*/affine_distillation.safetensors", 1),
            "after the second iteration": ("after", "*/affine_distillation.safetensors", 2),
            "after the last save": ("after", "*/affine_distillation.safetensors", 4),
            "before the checkpoint has its name": ("before", "*/out", 1),
        },
    ),
    "tcaq-dm": (
        {
            **SHORT,
            "progressive_alignment.iterations": 3,
            "progressive_alignment.later_iterations": 2,
            "progressive_alignment.rounds": 1,
            "progressive_alignment.samples": 16,
            "progressive_alignment.batch": 4,
        },
        {
            "in the first round": ("after", "*/progressive_alignment/round-0/*", 3),
            "as its own inputs are written": ("before", "*/trajectories-1.safetensors", 1),
            "before the second round": ("after", "*/trajectories-1.safetensors", 1),
            "in the second round": ("after", "*/progressive_alignment/round-1/*", 3),
        },
    ),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("recipe", OTHER_RECIPES, ids=lambda recipe: Path(recipe).stem)
def test_other_recipes_survive_a_kill_as_well(float_folder, tmp_path, recipe):
    settings, points = OTHER_RECIPES[recipe]
    whole = tmp_path / "whole"
    quantize(float_folder, recipe, 4, 4, whole, 3, settings, seed=2)
    root = tmp_path / "killed"
    root.mkdir()
    for name, folder in kill(float_folder, recipe, settings, points, root).items():
        assert (folder / "out.work").exists(), name
        quantize(float_folder, recipe, 4, 4, folder / "out", 3, settings, 2, True)
        assert tree(folder / "out") == tree(whole), name
