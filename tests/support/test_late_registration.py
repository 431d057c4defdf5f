"""Registration in the dictionaries of a module that is imported later."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from stepquant.support.late_registration import register_late


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """The name of a module with a dictionary, which nobody has imported."""
    name = "stepquant_test_tables"
    (tmp_path / f"{name}.py").write_text("TABLE = {}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield name
    sys.modules.pop(name, None)


def register(module, key="mine"):
    register_late(module, {"TABLE": {key: ("collections", "OrderedDict")}})


def test_an_entry_is_there_after_the_import(tables):
    register(tables)
    found = importlib.import_module(tables).TABLE["mine"]
    assert found.__name__ == "OrderedDict"
    assert found(a=1) == {"a": 1}


def test_looking_for_the_module_does_not_use_the_registration_up(tables):
    register(tables)
    assert importlib.util.find_spec(tables) is not None
    assert "mine" in importlib.import_module(tables).TABLE


def test_a_reloaded_module_has_its_entries_again(tables):
    register(tables)
    module = importlib.import_module(tables)
    assert "mine" in importlib.reload(module).TABLE


def test_two_registrations_in_one_module_are_both_made(tables):
    register(tables)
    register(tables, "other")
    assert set(importlib.import_module(tables).TABLE) == {"mine", "other"}


def test_a_module_that_does_not_exist_stays_missing(tables):
    register("stepquant_test_absent")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("stepquant_test_absent")
