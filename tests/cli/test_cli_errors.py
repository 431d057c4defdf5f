import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
from safetensors import SafetensorError

from cli_runs import TINY, record, refused, run, tree
from stepquant import api, cli
from stepquant.methods import block_distillation

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def quantize(model, out, *more):
    return ["quantize", model, "--recipe=dilatequant", *TINY, "--out", out, *more]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--recipe=dilatequaint"], "unknown recipe 'dilatequaint'"),
        (["--recipe=nowhere.yaml"], "recipe file 'nowhere.yaml' does not exist"),
        (["--set=blok_distillation.batch=4"], "no setting 'blok_distillation.batch'"),
        (["--set=block_distillation.batches=4"], "no setting 'block_distillation.batches'"),
        (["--set=block_distillation.batch=zero"], "block_distillation"),
        (["--set=block_distillation.batch"], "expected step.key=value"),
        (["--set=block_distillation.batch=[1"], "not YAML"),
        (["--weights=9"], "9"),
        (["--activations=0"], "0"),
        (["--set=calibration.trajectories=0"], "trajectories"),
        (["--steps=0"], "steps"),
        (["--set=calibration.scheduler=dimm"], "unknown scheduler 'dimm'"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_quantize_refuses_bad_settings(float_folder, tmp_path, more, words):
    sentence = refused(*quantize(float_folder, tmp_path / "out", *more, "--json", tmp_path / "j"))
    assert words in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: mine\ndescription: none\nsteps: [weight_dilatation]\n", "weight_dilatation"),
        ("name: mine\ndescription: none\nstep: []\n", "unknown key 'step'"),
        (
            "name: mine\ndescription: none\nsteps: [{weight_dilation: {max: 3}}]\n",
            "unknown key 'max'",
        ),
        ("name: [", "not YAML"),
        ("- weight_dilation\n", "expected keys"),
    ],
    ids=["step", "recipe-key", "step-key", "yaml", "list"],
)
def test_quantize_refuses_a_bad_recipe_file(float_folder, tmp_path, text, words):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    sentence = refused("quantize", float_folder, "--recipe", recipe, "--out", tmp_path / "out")
    assert words in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_an_existing_output_folder_is_left_as_it_is(float_folder, packed_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    for command in (
        quantize(float_folder, tmp_path / "out"),
        ["sample", float_folder, "--num=1", "--steps=1", "--out", tmp_path / "out"],
        ["inspect", packed_folder, "--plots", tmp_path / "out"],
        ["demo", "--out", tmp_path / "out"],
    ):
        assert "exists" in refused(*command)
    assert tree(tmp_path) == {"out/precious": b"mine"}


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        (["sample", "--num=0", "--grid=GRID"], "number of images is 0"),
        (["sample", "--num=1", "--steps=0", "--grid=GRID"], "steps is 0"),
        (["sample", "--num=1"], "expected --grid FILE or --out DIR"),
        (["sample", "--num=1", "--grid=grid.jpg"], ".png"),
        (["sample", "--num=1", "--scheduler=dimm", "--grid=GRID"], "unknown scheduler"),
        (["sample", "--num=1", "--memory=tiny", "--grid=GRID"], "unknown memory mode 'tiny'"),
        (["evaluate", "--against=FLOAT", "--num=0"], "number of images is 0"),
        (["evaluate", "--against=FLOAT", "--num=2", "--steps=1", "--features=no"], "'no'"),
        (["bench", "--against=FLOAT", "--batch=0"], "batch size is 0"),
        (["bench", "--against=FLOAT", "--batch=1", "--backend=cuda"], "unknown backend"),
        (["bench", "--against=FLOAT", "--batch=1", "--repeats=0"], "repeats is 0"),
        (["bench", "--against=PACKED", "--batch=1"], "float model"),
        (["quantize", "--out=OUT"], "quantized already"),
    ],
    ids=lambda value: "-".join(value).replace("=", "") if isinstance(value, list) else "",
)
def test_verbs_refuse_bad_values(float_folder, packed_folder, tmp_path, verb, words):
    names = {"GRID": "grid.png", "OUT": "out"}
    places = {name: tmp_path / file for name, file in names.items()}
    places |= {"FLOAT": float_folder, "PACKED": packed_folder}
    command = [verb[0], packed_folder, *verb[1:]]
    for name, place in places.items():
        command = [str(word).replace(f"={name}", f"={place}") for word in command]
    assert words in refused(*command, "--json", tmp_path / "record.json")
    assert not list(tmp_path.iterdir())


def test_the_seed_images_of_a_float_model_are_at_least_one(float_folder):
    assert "0" in refused("inspect", float_folder, "--num=0", "--steps=1")


def test_bench_wants_a_packed_model(float_folder):
    assert "no packed layer" in refused("bench", float_folder, "--against", float_folder)


def test_missing_and_refused_models(float_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pickled = tmp_path / "pickled"
    shutil.copytree(float_folder, pickled)
    weights = pickled / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    cut = tmp_path / "cut"
    shutil.copytree(float_folder, cut)
    weights = cut / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = tree(tmp_path)
    for model, words in (
        (tmp_path / "nowhere", "does not exist"),
        ("./no/such/folder", "does not exist"),
        (float_folder / "unet", "pass the folder above"),
        (pickled, "pickle files are refused"),
        (cut, "not a whole safetensors file"),
        ("builtin:nothing", "unknown embedded model 'builtin:nothing'"),
        ("nobody-we-know/no-such-model", "nobody-we-know/no-such-model"),
    ):
        assert words in refused(*quantize(model, tmp_path / "out"))
    assert tree(tmp_path) == before
    assert capfd.readouterr().err == ""  # libraries keep silent, too


def test_every_verb_tells_of_a_missing_model(float_folder, tmp_path):
    missing = tmp_path / "nowhere"
    for command in (
        ["sample", missing, "--grid", tmp_path / "grid.png"],
        ["evaluate", missing, "--against", float_folder],
        ["evaluate", float_folder, "--against", missing],
        ["bench", missing, "--against", float_folder],
        ["inspect", missing],
    ):
        assert "does not exist" in refused(*command)
    assert not list(tmp_path.iterdir())


def test_a_json_file_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "recipe_names", lambda: pytest.fail("work was begun"))
    sentence = refused("recipes", "list", "--json", tmp_path / "missing" / "record.json")
    assert "expected its folder" in sentence
    assert "folder" in refused("recipes", "list", "--json", tmp_path)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error (os error 28)")],
    ids=["python", "safetensors"],
)
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    path = tmp_path / "record.json"
    path.write_text("old")
    monkeypatch.setattr(api, "quantize", full)
    sentence = refused("quantize", "any", "--out", tmp_path / "out", "--json", path)
    assert sentence == (
        "no space left on the disk: free some, or write to another disk; finished work is kept, "
        "continue with --resume"
    )
    assert tree(tmp_path) == {"record.json": b"old"}


def test_ctrl_c_outside_a_verb_exits_with_2_as_well(monkeypatch):
    def interrupted(prog_name, standalone_mode):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as end:
        cli.app_main()
    assert end.value.code == 2


def test_an_unwritable_place_is_one_sentence(float_folder, tmp_path):
    (tmp_path / "file").write_text("")
    sentence = refused("recipes", "show", tmp_path / "file" / "mine.yaml")
    assert "mine.yaml" in sentence
    sentence = refused(*quantize(float_folder, tmp_path / "file" / "out"))
    assert str(tmp_path / "file") in sentence


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    def defect():
        raise KeyError("a bug")

    monkeypatch.setattr(api, "recipe_names", defect)
    result = run("recipes", "list")
    assert isinstance(result.exception, KeyError)


def test_warnings_are_lines_on_stderr(monkeypatch):
    def warn():
        warnings.warn("there are few samples", stacklevel=1)
        return []

    monkeypatch.setattr(api, "recipe_names", warn)
    assert run("recipes", "list").stderr == "warning: there are few samples\n"
    assert run("recipes", "list", "--quiet").stderr == ""


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("frob", "No such command 'frob'; see `stepquant --help`"),
        ("quantize", "Missing argument 'MODEL'; see `stepquant quantize --help`"),
        ("quantize m --out x --frob 3", "No such option: --frob; see `stepquant quantize --help`"),
        ("recipes show", "Missing argument 'NAME'; see `stepquant recipes show --help`"),
    ],
)
def test_wrong_usage_is_one_sentence(command, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stepquant", *command.split()])
    with pytest.raises(SystemExit) as end:
        cli.app_main()
    assert end.value.code == 2
    assert capsys.readouterr() == ("", sentence + "\n")


def test_the_verb_s_exit_code_is_the_command_s(monkeypatch, capsys):
    for command, code in (("--version", 0), ("recipes list", 0), ("recipes show nothing", 2)):
        monkeypatch.setattr(sys, "argv", ["stepquant", *command.split()])
        with pytest.raises(SystemExit) as end:
            cli.app_main()
        assert (end.value.code or 0) == code


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    float_folder, packed_folder, tmp_path, monkeypatch
):
    command = [
        "quantize",
        float_folder,
        "--recipe=dilatequant",
        "--weights=4",
        "--activations=8",
        *TINY,
        "--seed=3",
        "--out",
        tmp_path / "packed",
        "--json",
        tmp_path / "packed.json",
    ]
    train = block_distillation.BlockDistillation._train
    blocks = []

    def interrupt(self, session, name, *more):
        blocks.append(name)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return train(self, session, name, *more)

    monkeypatch.setattr(block_distillation.BlockDistillation, "_train", interrupt)
    result = run(*command)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == (
        "interrupted; finished work is kept, continue with --resume"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["packed.work"]
    assert "--resume" in refused(*command)
    other_seed = [word if word != "--seed=3" else "--seed=4" for word in command]
    assert "another job" in refused(*other_seed, "--resume")
    blocks.append("counted on")
    result = run(*command, "--resume")
    assert result.exit_code == 0, result.stderr
    assert blocks.count(blocks[0]) == 1
    assert tree(tmp_path / "packed") == tree(packed_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "packed.json"]
    assert record(tmp_path / "packed.json")["arguments"]["resume"] is True


def test_ctrl_c_in_a_real_process(float_folder, tmp_path):
    endless = "--set=block_distillation.iterations=100000"
    command = map(str, quantize(float_folder, tmp_path / "out", endless))
    # A shell starts background jobs with the interrupt ignored, and children inherit that.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from stepquant.cli import app_main; app_main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.work" / "ranges.safetensors").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stdout == ""
    assert stderr.splitlines()[-1] == "interrupted; finished work is kept, continue with --resume"
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
