from __future__ import annotations

import importlib
import sys

import pytest

from fake_packages import install
from quantize_runs import refused
from stepquant.support.registry import Registry

GROUP = "stepquant.shapes"
REGISTERS = "import fruits\n\n@fruits.register\nclass Kiwi:\n    name = 'kiwi'\n"


@pytest.fixture
def fruits(tmp_path, monkeypatch):
    """A package `fruits` with a registry of the classes in its modules, on the path."""
    (tmp_path / "fruits").mkdir()
    (tmp_path / "fruits" / "__init__.py").write_text("")
    for name in ("apple", "pear"):
        text = f"import fruits\n@fruits.register\nclass Fruit:\n    name = '{name}'\n"
        (tmp_path / "fruits" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import fruits

    registry = Registry("fruit", GROUP, "fruits")
    fruits.register = lambda kind: registry.register(kind.name, kind, kind) or kind
    yield registry
    for name in [name for name in sys.modules if name.partition(".")[0] in ("fruits", "kiwis")]:
        del sys.modules[name]


def test_the_modules_of_the_home_are_imported_at_the_first_look_up(fruits):
    assert "fruits.apple" not in sys.modules
    assert list(fruits) == ["apple", "pear"]
    assert fruits["pear"].__module__ == "fruits.pear"
    assert len(fruits) == 2 and "apple" in fruits and "plum" not in fruits


def test_names_are_sorted_whatever_was_imported_first(fruits):
    importlib.import_module("fruits.pear")
    assert list(fruits) == ["apple", "pear"]


def test_an_unknown_name_lists_what_there_is(fruits):
    assert refused(lambda: fruits.find("plum")) == (
        "unknown fruit 'plum': expected one of apple, pear; a fruit of another package needs that "
        "package installed"
    )
    assert fruits.get("plum") is None
    with pytest.raises(KeyError):
        fruits["plum"]


def test_a_name_is_given_once(fruits):
    class Mine:
        name = "pear"

    told = refused(lambda: fruits.register("pear", Mine, Mine))
    assert told.startswith("fruit 'pear' of ") and "has the name of fruits.pear.Fruit: ex" in told


def test_the_same_definition_registers_again(fruits):
    for _ in range(2):

        class Mine:
            name = "plum"

        fruits.register("plum", Mine, Mine)
    assert fruits["plum"] is Mine


def test_an_installed_package_adds_its_own(fruits, tmp_path):
    install(tmp_path, "kiwis", {"kiwi": "kiwis"}, GROUP, REGISTERS)
    assert list(fruits) == ["apple", "pear", "kiwi"]
    assert "kiwis" not in sys.modules
    assert fruits["kiwi"].__module__ == "kiwis"
    assert fruits.package("kiwi") == ("kiwis", "1.0")
    assert fruits.package("pear") is None


BROKEN = {
    "no module": (None, "kiwis", "ModuleNotFoundError: No module named 'kiwis'"),
    "raises": ("raise OSError('two\\nlines')", "kiwis", "OSError: two lines"),
    "no such class": (REGISTERS, "kiwis:Lime", "AttributeError: "),
    "registers nothing": ("", "kiwis", "it registers no fruit of that name"),
    "takes a name": (REGISTERS.replace("kiwi", "pear"), "kiwis", "has the name of fruits.pear"),
}


@pytest.mark.parametrize(("module", "value", "why"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_package_is_told_when_its_name_is_asked_for(fruits, tmp_path, module, value, why):
    install(tmp_path, "kiwis", {"kiwi": value}, GROUP, module)
    assert "kiwi" in fruits and fruits["pear"].name == "pear"
    told = refused(lambda: fruits.find("kiwi"))
    assert told.startswith(
        f"fruit 'kiwi' of the package 'kiwis' 1.0 cannot be loaded from '{value}'"
    )
    assert why in told and told.endswith("repair or uninstall that package")
    assert "kiwi" in refused(lambda: fruits.find("plum"))


def test_a_name_in_two_packages_is_told(fruits, tmp_path):
    install(tmp_path, "kiwis", {"kiwi": "kiwis", "pear": "kiwis"}, GROUP, REGISTERS)
    install(tmp_path, "others", {"kiwi": "others"}, GROUP, REGISTERS)
    told = refused(lambda: fruits.find("kiwi"))
    assert told.startswith("fruit 'kiwi' is in the package 'kiwis' 1.0 and in the package 'others'")
    told = refused(lambda: fruits.find("pear"))
    assert told.startswith("fruit 'pear' is in stepquant and in the package 'kiwis' 1.0: expected ")
    assert fruits["apple"].name == "apple"
