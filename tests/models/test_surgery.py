from __future__ import annotations

import torch
from torch import nn

from stepquant.models.surgery import copy_around, replace_modules


def nested() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.ModuleDict({"a": nn.SiLU()})
    )


def test_every_module_is_asked_about_by_its_name_parents_first() -> None:
    model, asked = nested(), []

    def ask(name: str, module: nn.Module) -> None:
        assert model.get_submodule(name) is module
        asked.append(name)

    assert replace_modules(model, ask) is model
    assert asked == ["0", "1", "1.0", "1.1", "2", "2.a"]


def test_replacements_stand_where_the_modules_stood() -> None:
    model = nested()
    kept = model[1][0]
    replace_modules(
        model, lambda _, module: nn.Identity() if isinstance(module, nn.Linear) else None
    )
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Identity)] == [
        "0",
        "1.1",
    ]
    assert model[1][0] is kept
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(model[1](model[0](x)), torch.tensor([0.0, 2.0]))


def test_children_of_a_replaced_module_are_not_visited() -> None:
    model, asked = nested(), []

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        asked.append(name)
        # The replacement holds the same child under the same name.
        return nn.Sequential(module[0]) if name == "1" else None

    replace_modules(model, replace)
    assert asked == ["0", "1", "2", "2.a"]
    assert len(model[1]) == 1


def test_a_replacement_may_wrap_the_module_it_replaces() -> None:
    model = nested()
    first = model[0]
    replace_modules(
        model, lambda _, module: nn.Sequential(module) if isinstance(module, nn.Linear) else None
    )
    assert model[0][0] is first and isinstance(model[1][1][0], nn.Linear)


def test_a_module_in_several_places_is_replaced_once_for_all() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Sequential(shared), nn.ReLU())
    replaced: list[str] = []

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.Linear):
            return None
        replaced.append(name)
        return nn.Identity()

    replace_modules(model, replace)
    assert replaced == ["0"]
    assert isinstance(model[0], nn.Identity) and model[1][0] is model[0]


def test_the_model_itself_is_not_asked_about() -> None:
    model = nn.Linear(2, 2)
    assert replace_modules(model, lambda *_: nn.Identity()) is model
    empty = nn.Sequential()
    empty.register_module("absent", None)
    assert replace_modules(empty, lambda *_: nn.Identity())._modules == {"absent": None}


def test_a_copy_around_modules_has_their_tensors_and_copies_of_all_others():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[3].weight = model[2].weight
    new = copy_around(model, [model[0], model[2]])
    assert new[0] is not model[0] and new[0].weight is model[0].weight
    assert new[1].weight is not model[1].weight
    assert torch.equal(new[1].weight, model[1].weight)
    assert new[2].bias is model[2].bias
    assert new[2].weight is new[3].weight and new[3].weight is not model[3].weight
