from __future__ import annotations

import pytest
import torch
from torch import nn

from concurrent_calls import at_once
from stepquant.models.hooks import hooked


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x, more=0.0):
        return self.inner(x) * 2 + more


def test_hooks_see_each_call_by_name_and_are_removed():
    model, seen = Twice(), []
    x = torch.ones(2)

    def before(name, args, kwargs):
        seen.append((name, len(args), dict(kwargs)))

    def after(name, args, kwargs, output):
        seen.append((name, output.tolist()))

    with hooked({"outer": model, "inner": model.inner}, before, after):
        model(x, more=1.0)
    assert seen == [
        ("outer", 1, {"more": 1.0}),
        ("inner", 1, {}),
        ("inner", [1.0, 1.0]),
        ("outer", [3.0, 3.0]),
    ]
    model(x)
    assert len(seen) == 4


def test_hooks_may_replace_arguments_and_outputs():
    model = Twice()
    with hooked({"": model}, lambda _, args, kwargs: ((args[0] + 1,), {"more": 3.0})):
        assert model(torch.zeros(1)).item() == 5.0
    with hooked({"": model}, after=lambda *_: "other"):
        assert model(torch.zeros(1)) == "other"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_hooks_are_removed_after_an_error(error):
    model = Twice()

    def fail(*_):
        raise error

    with pytest.raises(error), hooked({"": model, "inner": model.inner}, fail, fail):
        model(torch.zeros(1))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_calls_of_other_threads_are_left_alone():
    model, seen = Twice(), []
    with hooked({"": model}, lambda *call: seen.append(call), lambda *_: "other"):
        (found,) = at_once(lambda: model(torch.ones(1)))
        assert model(torch.ones(1)) == "other"
    assert found.item() == 2.0 and len(seen) == 1
