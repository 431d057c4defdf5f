"""Recorded denoisers: the numbers of the denoiser, in every state that it is found in."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from fast_models import STATIC, TABLES, packed, packed_pipeline
from torch import Tensor, nn

from architectures import ARCHITECTURES
from stepquant.api import sample
from stepquant.bench import set_backend
from stepquant.models.adapter import adapter_for
from stepquant.models.calling import named_arguments
from stepquant.runtime import native
from stepquant.runtime.packed import PackedLayer
from stepquant.runtime.recording import RecordedDenoiser, recorded
from stepquant.runtime.recording import denoiser as room
from stepquant.runtime.resident import set_memory_mode
from stepquant.sampling import with_recorded_denoiser

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(native.why_no_products() is not None, reason=str(native.why_no_products())),
]


def inputs(model: nn.Module, batch: int, seed: int, step: int = 0) -> tuple[Tensor, dict]:
    """A sample, and the other arguments at one of the recorded steps, the same for all samples."""
    sample, at, conditions = adapter_for(model).random_inputs(model, batch)
    generator = torch.Generator().manual_seed(seed)
    grid = next(m for m in model.modules() if isinstance(m, PackedLayer)).context.grid
    at = torch.full_like(at, float(grid.timesteps[step]))
    more = {
        name: torch.randn(value.shape, generator=generator)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in conditions.items()
    }
    return torch.randn(sample.shape, generator=generator), {
        "timestep": at,
        **named_arguments(model, more),
    }


def predict(model: nn.Module, given: tuple[Tensor, dict]) -> Tensor:
    with torch.no_grad():
        found = model(given[0], **given[1])
    return found if isinstance(found, Tensor) else found[0]


def assert_alike(model: RecordedDenoiser, plain: nn.Module, batch: int = 2, calls: int = 5) -> None:
    """Other samples, conditions and steps in each call."""
    for number in range(calls):
        given = inputs(plain, batch, seed=number, step=number % 3)
        kept = given[0].clone()
        assert torch.equal(predict(model, given), predict(plain, given))
        assert torch.equal(given[0], kept)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("recipe", [STATIC, TABLES], ids=lambda recipe: recipe.name)
def test_replays_give_the_denoisers_bits(name, recipe):
    plain = packed(name, recipe)
    model = RecordedDenoiser(copy.deepcopy(plain))
    assert_alike(model, plain)
    assert (model.recordings, model.reasons) == (1, [])


def test_each_shape_has_a_recording_of_its_own():
    plain = packed("sd", TABLES)
    model = RecordedDenoiser(plain)
    for batch in (1, 3, 1, 2, 3, 1, 2, 2):
        given = inputs(plain, batch, seed=batch)
        assert torch.equal(predict(model, given), predict(plain, given))
    assert model.recordings == 3 and model.nbytes > 0
    model.forget()
    assert model.recordings == 0 and model.nbytes == 0


def test_only_the_latest_shapes_are_kept(monkeypatch):
    monkeypatch.setattr(room, "MOST_SHAPES", 2)
    plain = packed("dit")
    model = RecordedDenoiser(plain)
    for batch in (1, 1, 2, 2, 3, 3):
        given = inputs(plain, batch, seed=batch)
        assert torch.equal(predict(model, given), predict(plain, given))
    assert model.recordings == 2


def test_results_are_the_callers_own():
    plain = packed("sd")
    model = RecordedDenoiser(plain)
    given = [inputs(plain, 1, seed) for seed in range(4)]
    found = [predict(model, each) for each in given]
    for each, result in zip(given, found, strict=True):
        assert torch.equal(result, predict(plain, each))


def test_samples_at_different_steps_run_as_ever():
    plain = packed("sd", TABLES)
    model = RecordedDenoiser(plain)
    sample, arguments = inputs(plain, 2, seed=0)
    grid = next(m for m in plain.modules() if isinstance(m, PackedLayer)).context.grid
    arguments["timestep"] = grid.timesteps[[0, 2]]
    for _ in range(3):
        given = (sample, arguments)
        assert torch.equal(predict(model, given), predict(plain, given))
    assert model.recordings == 0 and "reads numbers" in model.reasons[0]


def add_lora(model: nn.Module) -> None:
    class Branch(nn.Module):
        def add_to(self, y: Tensor, x: Tensor) -> Tensor:
            return y + 1

    next(m for m in model.modules() if isinstance(m, PackedLayer)).lora = Branch()


def scale_a_norm(model: nn.Module) -> None:
    norm = next(m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm))
    norm.weight.data = norm.weight.data * 1.5


def replace_a_norm(model: nn.Module) -> None:
    norm = next(m for m in model.modules() if isinstance(m, nn.GroupNorm))
    norm.weight = nn.Parameter(norm.weight.detach() * 1.5)


def share_memory(model: nn.Module) -> None:
    model.share_memory()


def other_kernels(model: nn.Module) -> None:
    set_backend(model, "reference")


def low_memory(model: nn.Module) -> None:
    set_memory_mode(model, "low")


def hook(model: nn.Module) -> None:
    model.conv_in.register_forward_hook(lambda module, args, output: output * 1.5)


def train(model: nn.Module) -> None:
    model.train()


def load_other_weights(model: nn.Module) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["conv_in.bias"] += 1
    model.load_state_dict(state)


def half(model: nn.Module) -> None:
    for part in model.children():
        part.to(torch.bfloat16).to(torch.float32)


CHANGES = [
    *(add_lora, scale_a_norm, replace_a_norm, share_memory, other_kernels, low_memory, hook),
    *(train, load_other_weights, half),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
def test_changes_of_the_denoiser_are_seen(change):
    plain = packed("sd", TABLES)
    model = RecordedDenoiser(copy.deepcopy(plain))
    assert_alike(model, plain)
    for each in (plain, model.denoiser):
        change(each)
    assert_alike(model, plain)
    assert_alike(model, plain)


def test_another_number_of_threads_is_seen():
    plain = packed("sd")
    model = RecordedDenoiser(plain)
    assert_alike(model, plain)
    torch.set_num_threads(2)
    assert_alike(model, plain)
    assert model.recordings == 1


def test_gradients_and_autocast_run_as_ever():
    plain = packed("sd")
    model = RecordedDenoiser(plain)
    given = inputs(plain, 1, seed=0)
    for _ in range(3):
        assert torch.equal(model(given[0], **given[1])[0], predict(plain, given))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert torch.equal(predict(model, given), predict(plain, given))
    assert model.recordings == 0


def test_inference_mode_and_none_after_one_another():
    plain = packed("dit")
    model = RecordedDenoiser(plain)
    for number in range(6):
        given = inputs(plain, 2, seed=number)
        with torch.inference_mode(number % 2 == 0):
            assert torch.equal(predict(model, given), predict(plain, given))
    assert model.recordings == 1


def test_a_replay_that_gives_other_numbers_is_not_used(caplog):
    class Counting(nn.Module):
        """Python that a replay does not run."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, sample: Tensor, timestep: Tensor, **more: object) -> Tensor:
            self.calls += 1
            return self.inner(sample, timestep=timestep, **more)[0] * self.calls

    model = RecordedDenoiser(Counting(packed("sd")).eval())
    plain = packed("sd")
    with caplog.at_level("INFO"):
        for number in range(5):
            given = inputs(plain, 1, seed=number)
            assert torch.equal(predict(model, given), predict(plain, given) * (number + 1))
    assert model.reasons == ["a replay gives other numbers than the denoiser"]
    assert "are not recorded: a replay gives other numbers" in caplog.text


def test_copies_record_their_own():
    plain = packed("sd", TABLES)
    model = RecordedDenoiser(copy.deepcopy(plain))
    assert_alike(model, plain)
    other = copy.deepcopy(model)
    assert other.recordings == 0 and other.denoiser is not model.denoiser
    scale_a_norm(other.denoiser)
    scaled = copy.deepcopy(plain)
    scale_a_norm(scaled)
    assert_alike(other, scaled)
    assert_alike(model, plain)


def test_threads_take_turns():
    plain = packed("sd", TABLES)
    model = RecordedDenoiser(plain)
    given = [inputs(plain, 1, seed) for seed in range(8)]
    expected = [predict(plain, each) for each in given]
    found: dict[int, bool] = {}

    def run(number: int) -> None:
        torch.set_num_threads(1)
        calls = [predict(model, given[number]) for _ in range(3)]
        found[number] = all(torch.equal(call, expected[number]) for call in calls)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(8), True)


def test_it_looks_like_the_denoiser():
    plain = packed("sd")
    model = RecordedDenoiser(plain)
    assert model.config is plain.config and model.dtype == torch.float32
    assert recorded(model) is model and isinstance(recorded(plain), RecordedDenoiser)
    assert recorded(nn.Linear(2, 2)).__class__ is nn.Linear
    plain.train()
    assert recorded(plain) is plain


def test_sampling_records(monkeypatch):
    pipeline = packed_pipeline("dit", TABLES)
    found = []
    monkeypatch.setattr(
        "stepquant.sampling.with_recorded_denoiser",
        lambda given: found.append(with_recorded_denoiser(given)) or found[-1],
    )
    options = {"num": 2, "steps": 3, "labels": [0, 1]}
    images = sample(pipeline, **options)
    assert isinstance(found[0].transformer, RecordedDenoiser)
    assert found[0].transformer.recordings == 1
    assert not isinstance(pipeline.transformer, RecordedDenoiser)
    monkeypatch.setattr("stepquant.sampling.with_recorded_denoiser", lambda given: given)
    assert torch.equal(sample(pipeline, **options), images)
