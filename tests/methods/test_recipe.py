from __future__ import annotations

import pytest
import yaml

from fake_packages import install
from stepquant.methods import STEPS, BlockDistillation, Step, WeightDilation, register_step
from stepquant.methods.recipe import Recipe, load_recipe, parse_recipe, parse_step, recipe_names
from stepquant.simulation.scheme import Override, Scheme
from stepquant.support.errors import StepQuantError
from stepquant.support.plugins import PlugIns

BASE = {"name": "mine", "description": "for a test"}


def refused(act) -> str:
    """The one sentence (nothing but a StepQuantError will do)."""
    with pytest.raises(StepQuantError) as error:
        act()
    sentence = str(error.value)
    assert "\n" not in sentence
    assert "pydantic" not in sentence
    return sentence


def test_minmax_and_dilatequant_are_shipped():
    assert {"dilatequant", "minmax"} <= set(recipe_names())
    assert recipe_names() == sorted(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_says_who_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(recipe.description) > 20


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_survives_yaml(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "copy.yaml"
    path.write_text(recipe.to_yaml())
    again = load_recipe(path)
    assert again == recipe
    steps, same = (getattr(each, "steps", ()) for each in (recipe, again))
    assert [type(step) for step in same] == [type(step) for step in steps]
    assert load_recipe(str(path)) == recipe
    assert parse_recipe(recipe.to_dict(), "x") == recipe


def test_the_steps_of_dilatequant_are_the_three_of_the_paper():
    names = [step.name for step in load_recipe("dilatequant").steps]
    assert names == ["weight_dilation", "temporal_quantizer", "block_distillation"]
    assert load_recipe("minmax").steps == ()
    assert load_recipe("minmax").ranges.weights == "minmax"


def test_a_recipe_of_ones_own_survives_yaml_with_all_it_says():
    override = Override(pattern="conv_*", weight_bits=8, activation_bits=7)
    recipe = Recipe(
        **BASE,
        scheme=Scheme(weight_bits=3, activation_bits=4, overrides=(override,)),
        calibration={"trajectories": 3, "steps": 7, "scheduler": None},
        ranges={"weights": "minmax"},
        steps=["weight_dilation", {"block_distillation": {"iterations": 5, "float_inputs": True}}],
    )
    again = parse_recipe(yaml.safe_load(recipe.to_yaml()), "x")
    assert again == recipe
    assert again.scheme.overrides == (override,)
    assert again.calibration.scheduler is None
    assert again.steps[1] == BlockDistillation(iterations=5, float_inputs=True)


def test_every_default_is_written_out():
    plain = load_recipe("dilatequant").to_dict()
    assert plain["steps"][2]["block_distillation"].keys() == BlockDistillation.model_fields.keys()
    assert plain["calibration"].keys() == {"trajectories", "steps", "scheduler", "batch"}


def test_a_recipe_is_its_own_recipe():
    recipe = load_recipe("minmax")
    assert load_recipe(recipe) is recipe


@pytest.mark.parametrize("name", sorted(STEPS))
def test_a_step_is_a_name_or_a_mapping_or_itself(name):
    step = parse_step(name)
    assert type(step) is STEPS[name]
    assert parse_step({name: None}) == parse_step({name: {}}) == step
    assert parse_step({name: step.model_dump()}) == step
    assert parse_step(step) is step


def test_an_unknown_recipe_is_named():
    sentence = refused(lambda: load_recipe("dilate"))
    expected = "unknown recipe 'dilate': expected one of dilatequant, efficientdm, minmax"
    assert sentence.startswith(expected)


def test_a_recipe_file_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "no.yaml"
    assert refused(lambda: load_recipe(path)).startswith(f"recipe file '{path}' does not exist")
    (tmp_path / "folder.yaml").mkdir()
    assert "does not exist" in refused(lambda: load_recipe(tmp_path / "folder.yaml"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("name: [1", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("name: a\n\tb: c", "is not YAML"),
        ("", "holds a NoneType: expected keys such as name and steps"),
        ("- weight_dilation", "holds a list"),
        ("just words", "holds a str"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
    ids=["open bracket", "two colons", "tab", "empty", "list", "text", "not text"],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, content, told):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    sentence = refused(lambda: load_recipe(path))
    assert sentence.startswith(f"recipe file '{path}' ")
    assert told in sentence


BAD = {
    "unknown key": ({"bits": 4}, "unknown key 'bits', expected one of name, description, scheme"),
    "key of a number": ({1: 2}, "'1'"),
    "unknown key inside": (
        {"scheme": {"bits": 4}},
        "unknown key 'scheme.bits', expected one of weight_bits, activation_bits, protocol",
    ),
    "unknown key of an override": (
        {"scheme": {"overrides": [{"pattern": "*", "bits": 4}]}},
        "'scheme.overrides.0.",
    ),
    "wrong type": ({"calibration": {"steps": "many"}}, "key 'calibration.steps' is 'many'"),
    "no mapping": ({"calibration": 5}, "key 'calibration' is 5"),
    "too small": ({"calibration": {"trajectories": 0}}, "key 'calibration.trajectories' is 0"),
    "no such choice": ({"ranges": {"weights": "best"}}, "key 'ranges.weights' is 'best'"),
    "bits": ({"scheme": {"weight_bits": 9}}, "bits of the scheme is 9: expected a whole number"),
    "bits of an override": (
        {"scheme": {"overrides": [{"pattern": "*", "weight_bits": True, "activation_bits": 4}]}},
        "bits of an override is True",
    ),
    "protocol": ({"scheme": {"protocol": "loose"}}, "unknown protocol 'loose': expected one of"),
    "unknown step": ({"steps": ["dilation"]}, "unknown step 'dilation': expected one of weight_"),
    "step of two": (
        {"steps": [{"weight_dilation": {}, "smoothing": {}}]},
        "is not understood: expected 'name'",
    ),
    "step of a number": ({"steps": [3]}, "step 3 is not understood"),
    "unknown key of a step": (
        {"steps": [{"weight_dilation": {"max": 3}}]},
        "step 'weight_dilation': unknown key 'max', expected one of max_factor",
    ),
    "wrong type in a step": (
        {"steps": [{"block_distillation": {"iterations": "few"}}]},
        "step 'block_distillation': key 'iterations' is 'few'",
    ),
    "bad value in a step": (
        {"steps": [{"weight_dilation": {"max_factor": 0.5}}]},
        "step 'weight_dilation': key 'max_factor' is 0.5",
    ),
    "settings that are no mapping": (
        {"steps": [{"weight_dilation": [3]}]},
        "step 'weight_dilation' has the settings [3]",
    ),
    "false for settings": (
        {"steps": [{"weight_dilation": False}]},
        "step 'weight_dilation' has the settings False",
    ),
    "steps without dashes": (
        {"steps": {"block_distillation": {"iterations": 3}}},
        "expected a list, with a dash before each step",
    ),
    "a step for steps": ({"steps": "weight_dilation"}, "key 'steps' is 'weight_dilation'"),
    "a number for steps": ({"steps": 5}, "key 'steps' is 5"),
    "a step twice": (
        {"steps": ["smoothing", "smoothing"]},
        "step 'smoothing' appears twice",
    ),
}


@pytest.mark.parametrize(("change", "told"), BAD.values(), ids=BAD.keys())
def test_what_is_wrong_in_a_recipe_is_told_in_one_sentence(change, told):
    sentence = refused(lambda: parse_recipe({**BASE, **change}, "recipe 'mine'"))
    assert sentence.startswith("recipe 'mine': ")
    assert told in sentence


@pytest.mark.parametrize("bad", [None, 3, "Round", "scheme", "a.b"])
def test_a_step_has_a_name_that_a_recipe_can_have(bad):
    kind = type("Mine", (Step,), {"name": bad, "__annotations__": {"name": "ClassVar[str]"}})
    assert f"the name of the step Mine is {bad!r}: exp" in refused(lambda: register_step(kind))


def test_only_steps_are_registered():
    assert "is not a step" in refused(lambda: register_step(dict))


def test_an_installed_package_ships_recipes(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    (tmp_path / "mine" / "plain.yaml").write_text(yaml.safe_dump({**BASE, "steps": ["smoothing"]}))
    entries = {"plain": "mine", "absent": "mine", "minmax": "mine"}
    monkeypatch.syspath_prepend(install(tmp_path, "mine", entries, "stepquant.recipes"))
    monkeypatch.setattr("stepquant.methods.recipe.PLUG_INS", PlugIns("recipe", "stepquant.recipes"))
    assert {"plain", "absent", "dilatequant"} <= set(recipe_names())
    assert [step.name for step in load_recipe("plain").steps] == ["smoothing"]
    assert load_recipe("dilatequant").name == "dilatequant"
    told = refused(lambda: load_recipe("absent"))
    assert told.startswith("recipe 'absent' of the package 'mine' 1.0 cannot be loaded from 'mine'")
    assert "'minmax' is in stepquant and in the" in refused(lambda: load_recipe("minmax"))


def test_a_missing_key_is_named():
    assert "key 'description' is missing" in refused(lambda: parse_recipe({"name": "a"}, "r"))


def test_settings_are_overridden_by_dotted_names():
    recipe = load_recipe("dilatequant").override(
        {
            "scheme.weight_bits": 4,
            "calibration.scheduler": None,
            "block_distillation.iterations": 7,
            "weight_dilation.max_factor": 3.5,
        }
    )
    assert recipe.scheme.weight_bits == 4
    assert recipe.calibration.scheduler is None
    assert recipe.steps[0] == WeightDilation(max_factor=3.5)
    assert recipe.steps[2].iterations == 7
    untouched = load_recipe("dilatequant")
    assert recipe.steps[2].batch == untouched.steps[2].batch
    assert untouched.steps[2].iterations != 7
    assert untouched.override({}) == untouched


@pytest.mark.parametrize(
    "setting",
    [
        "block_distillation.iteration",
        "smoothing.alpha",
        "iterations",
        "scheme",
        "name.x",
        "",
        "a.b",
    ],
)
def test_an_unknown_setting_is_named_with_those_that_exist(setting):
    sentence = refused(lambda: load_recipe("dilatequant").override({setting: 1}))
    assert sentence.startswith(f"recipe 'dilatequant' has no setting '{setting}': expected one of ")
    for known in ("scheme.weight_bits", "calibration.steps", "block_distillation.iterations"):
        assert known in sentence


def test_a_bad_value_of_a_setting_is_told():
    override = load_recipe("dilatequant").override
    assert "key 'iterations' is -1" in refused(
        lambda: override({"block_distillation.iterations": -1})
    )
    assert "bits of the scheme is 'x'" in refused(lambda: override({"scheme.weight_bits": "x"}))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_rates_that_are_not_finite_are_refused(value):
    sentence = refused(lambda: parse_step({"block_distillation": {"weight_rate": value}}))
    assert "step 'block_distillation': key 'weight_rate'" in sentence
