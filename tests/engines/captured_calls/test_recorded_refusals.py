"""Calls that a replay would not do justice to."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fast_models import packed
from recorded_models import inputs, predict
from stepquant.engines.captured_calls import RecordedDenoiser
from stepquant.runtime.layers.integer import IntegerLinear
from stepquant.runtime.ops import native

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(native.why_no_products() is not None, reason=str(native.why_no_products())),
]


class Wrapped(nn.Module):
    """A packed denoiser with something before or behind it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("count", torch.zeros(()))

    def forward(self, sample: Tensor, timestep: Tensor, **more: object) -> object:
        return self.changed(self.inner(sample, timestep=timestep, **more)[0], timestep)

    def changed(self, y: Tensor, timestep: Tensor) -> object:
        raise NotImplementedError


class Drawing(Wrapped):
    def changed(self, y, timestep):
        return y + torch.randn_like(y)


class Counting(Wrapped):
    def changed(self, y, timestep):
        self.count.add_(1)
        return y


class Branching(Wrapped):
    def changed(self, y, timestep):
        return y * 2 if timestep.tolist() else y


class Paired(Wrapped):
    def changed(self, y, timestep):
        return SimpleNamespace(sample=y, variance=y * 2)


@dataclass
class Pair:
    sample: Tensor
    variance: Tensor


class PairedInFields(Wrapped):
    def changed(self, y, timestep):
        return Pair(y, y * 2)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Drawing, "draws random numbers"),
        (Counting, "writes to a tensor that the call has not made"),
        (Branching, "reads numbers out of a tensor"),
        (Paired, "returns a SimpleNamespace"),
        (PairedInFields, "returns more than the prediction"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_a_replay_would_not_do_is_not_recorded(kind, reason):
    model = RecordedDenoiser(kind(packed("sd")).eval())
    for number in range(3):
        sample, arguments = inputs(model.denoiser.inner, 1, number)
        with torch.no_grad():
            model(sample, **arguments)
    assert model.recordings == 0 and reason in model.reasons[0]


def test_constants_of_numpy_are_not_read_by_their_address():
    class Moved(Wrapped):
        def forward(self, sample, timestep, **more):
            offset = torch.from_numpy(np.full((1, 5, 32), 0.3, dtype=np.float32))
            linear = next(m for m in self.inner.modules() if type(m) is IntegerLinear)
            return (
                self.inner(sample, timestep=timestep, **more)[0]
                + linear(
                    offset[..., : linear.in_features].repeat(1, 1, 4)[..., : linear.in_features]
                ).mean()
            )

    plain = Moved(packed("sd")).eval()
    model = RecordedDenoiser(plain)
    for number in range(6):
        given = inputs(plain.inner, 1, number)
        assert torch.equal(predict(model, given), predict(plain, given))


def test_a_denoiser_whose_calls_change_it_is_recorded_once_at_most(caplog):
    class Counting(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, sample: Tensor, timestep: Tensor, **more: object) -> Tensor:
            self.calls += 1
            return self.inner(sample, timestep=timestep, **more)[0] * self.calls

    model = RecordedDenoiser(Counting(packed("sd")).eval())
    plain = packed("sd")
    with caplog.at_level("INFO"):
        for number in range(6):
            given = inputs(plain, 1 + number % 2, seed=number)
            assert torch.equal(predict(model, given), predict(plain, given) * (number + 1))
    assert model.reasons == ["a call changes attributes of the denoiser"]
    assert caplog.text.count("are not recorded") == 1


def test_a_replay_that_gives_other_numbers_is_not_used(caplog):
    class Multiplied(nn.Module):
        """Python that a replay does not run."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.calls = inner, [0]  # an attribute of its own would be seen

        def forward(self, sample: Tensor, timestep: Tensor, **more: object) -> Tensor:
            self.calls[0] += 1
            return self.inner(sample, timestep=timestep, **more)[0] * self.calls[0]

    model = RecordedDenoiser(Multiplied(packed("sd")).eval())
    plain = packed("sd")
    with caplog.at_level("INFO"):
        for number in range(5):
            given = inputs(plain, 1, seed=number)
            assert torch.equal(predict(model, given), predict(plain, given) * (number + 1))
    assert model.reasons == ["a replay gives other numbers than the denoiser"]
    assert "are not recorded: a replay gives other numbers" in caplog.text
