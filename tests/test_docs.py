"""The documentation: its code runs, its commands parse, its tables and figures are up to date."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import yaml
from typer.main import get_command

import doc_pages
import stepquant
from doc_pages import PAGES, ROOT, Short, Stage, blocks, commands, name
from plain_denoiser import SHAPE, Denoiser
from stepquant import api
from stepquant.cli import app
from stepquant.evaluation.metric import METRICS
from stepquant.methods import STEPS
from stepquant.methods.recipe import Calibration, Ranges, parse_recipe, recipe_names
from stepquant.runtime.kernels import onednn
from stepquant.simulation.scheme import Scheme

DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "stepquant"
# Blocks that do not run, each with its reason in the page. More need a reason, too.
NOT_RUN = 3

sys.path.append(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture
def registries() -> Iterator[None]:
    """Without what a page has registered, afterwards."""
    before = []
    for own in (STEPS, METRICS):
        assert len(own)  # its own entries are imported
        before.append((own, dict(own._entries), dict(own._origins)))
    yield
    for own, entries, origins in before:
        own._entries, own._origins = entries, origins


def shorten(monkeypatch: pytest.MonkeyPatch, short: Short) -> None:
    """Verbs with few images, steps and iterations, wherever a page imports them from."""
    for verb, function in short.verbs().items():
        monkeypatch.setattr(api, verb, function)
        monkeypatch.setattr(stepquant, verb, function)


PYTHON = [page for page in PAGES if any(not block.not_run for block in blocks(page, "python"))]


@pytest.mark.parametrize("page", PYTHON, ids=name)
def test_python_of_the_page_runs_in_order(
    page, stage, tmp_path, monkeypatch, registries, one_thread
):
    if "openvino" in page.name and (find_spec("openvino") is None or onednn.pairs_saturate()):
        pytest.skip("no OpenVINO, or no VNNI")
    monkeypatch.chdir(tmp_path)
    for wanted in doc_pages.words(page, "needs"):
        stage.put(wanted, tmp_path)
    shorten(monkeypatch, Short(stage, tmp_path))
    names: dict[str, Any] = {
        given: doc_pages.GIVEN[given] for given in doc_pages.words(page, "given")
    }
    for number, block in enumerate(blocks(page, "python"), 1):
        if block.not_run is None:
            exec(
                compile(doc_pages.shortened(block.code), f"{name(page)}, block {number}", "exec"),
                names,
            )


def test_blocks_that_do_not_run_are_few_and_give_a_reason():
    found = [block for page in PAGES for block in blocks(page, "python") if block.not_run]
    assert len(found) == NOT_RUN


def test_a_module_of_ones_own_takes_ten_lines(tmp_path, monkeypatch, stage, one_thread):
    page = DOCS / "how-to" / "quantize-a-module.md"
    code = blocks(page, "python")[0].code
    assert len([line for line in code.splitlines() if line]) <= 10
    monkeypatch.chdir(tmp_path)
    shorten(monkeypatch, Short(stage, tmp_path))
    names: dict[str, Any] = {"Denoiser": Denoiser}
    exec(code, names)
    assert names["images"].shape == (2, *SHAPE)
    again = api.load_module(Denoiser(), "packed")
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        assert torch.equal(again(x, torch.tensor(500)), names["packed"](x, torch.tensor(500)))


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(
    ("page", "words"),
    COMMANDS,
    ids=[f"{name(page)}: {' '.join(words)}" for page, words in COMMANDS],
)
def test_the_command_line_parses(page, words):
    command, context = get_command(app), None
    while hasattr(command, "commands"):  # a group: what follows is a verb
        first = command.make_context("stepquant", list(words), parent=context)
        verb, command, words = command.resolve_command(first, list(words))
        context = first
    assert command.make_context(verb, list(words), parent=context).params


def test_there_are_commands_and_code_to_test():
    assert len(COMMANDS) >= 30
    assert len(PYTHON) > 12


def test_every_script_that_a_page_runs_exists():
    for page in PAGES:
        for block in blocks(page, "bash"):
            for script in re.findall(r"python ((?:benchmarks|training)/\w+\.py)", block.code):
                assert (ROOT / script).is_file(), (name(page), script)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=name)
def test_recipes_in_the_page_are_recipes(page):
    for block in blocks(page, "yaml"):
        parse_recipe(yaml.safe_load(block.code), name(page))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_links_between_files_lead_somewhere():
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not re.match(r"https?:", link):
                assert (page.parent / link).exists(), f"{name(page)}: {link}"


def test_paths_in_the_pages_exist():
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for path in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|yaml|json|jsonl))`", page.read_text()):
            if path.startswith(
                ("benchmarks/", "tests/", "training/", "src/", "docs/", "examples/")
            ):
                assert (ROOT / path).exists(), f"{name(page)}: {path}"
            elif path.split("/")[0] in {folder.name for folder in SOURCE.iterdir()}:
                assert (SOURCE / path).exists(), f"{name(page)}: {path}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"([\w/-]+\.md)$", navigation, flags=re.MULTILINE))
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES if DOCS in page.parents}


# Tables and figures.


def test_tables_are_those_of_the_results():
    import doc_tables

    outdated = [str(page) for page in doc_tables.outdated()]
    assert not outdated, f"run python benchmarks/doc_tables.py: {outdated}"
    used = {found for page in PAGES for _, found, *_ in doc_tables.MARK.findall(page.read_text())}
    assert used == doc_tables.TABLES.keys()


def test_figures_are_those_of_the_results():
    figures = pytest.importorskip("figures")
    outdated = [found for found in figures.FIGURES if not figures.is_up_to_date(found)]
    assert not outdated, f"run python benchmarks/figures.py: {outdated}"


def test_a_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    figures = pytest.importorskip("figures")
    figures.write("speed", tmp_path)
    assert figures.digest("speed") in (tmp_path / "speed-dark.svg").read_text()


# Reference pages are complete.


def test_every_option_of_every_verb_is_in_the_reference():
    page = (DOCS / "reference" / "command-line.md").read_text()
    for verb in app.registered_commands:
        command = get_command(app).commands[verb.callback.__name__]
        if command.name == "pack":  # deprecated
            continue
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and option != "--help":
                    assert f"`{option}" in page or f"{option} " in page, (command.name, option)


def test_every_public_function_is_in_the_reference():
    folder = DOCS / "reference" / "api"
    pages = [(folder / f"{page}.md").read_text() for page in ("functions", "extending")]
    listed = set(re.findall(r"^::: stepquant\.api\.(\w+)$", "\n".join(pages), flags=re.MULTILINE))
    listed |= set(re.findall(r"`(\w+)`", pages[1]))
    assert set(api.__all__) - {"pack"} <= listed


def test_every_recipe_is_in_the_reference():
    page = (DOCS / "reference" / "recipes.md").read_text()
    for recipe in recipe_names():
        assert f"| `{recipe}` |" in page


def settings_in(section: str) -> dict[str, str]:
    """Setting -> default, from the tables of a section."""
    found = {}
    for names, defaults in re.findall(r"^\| (`[^|]*?) \| ([^|]*?) \|", section, flags=re.MULTILINE):
        keys = re.findall(r"`([\w.]+)`", names)
        found |= dict(zip(keys, defaults.replace("`", "").split(", "), strict=True))
    return found


def written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def own_settings(kind: Any) -> dict[str, str]:
    """Setting -> default, of those that the class itself defines."""
    fields = kind.__annotations__.keys() & kind.model_fields.keys()
    return {key: written(kind.model_fields[key].get_default()) for key in fields}


@pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
def test_every_setting_of_a_step_is_in_the_reference(step):
    page = (DOCS / "reference" / "recipes.md").read_text()
    (section,) = re.findall(
        rf"^### {step.name}$(.*?)(?=^###? |\Z)", page, flags=re.MULTILINE | re.S
    )
    assert settings_in(section) == own_settings(step)


def test_every_setting_of_a_recipes_sections_is_in_the_reference():
    page = (DOCS / "reference" / "recipes.md").read_text()
    section = page.partition("## Sections of a recipe")[2].partition("## Steps")[0]
    kinds = {"scheme": Scheme, "calibration": Calibration, "ranges": Ranges}
    expected = {
        f"{part}.{key}": "[]" if key == "overrides" else value
        for part, kind in kinds.items()
        for key, value in own_settings(kind).items()
    }
    assert settings_in(section) == expected
