from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from stepquant.methods import RelationDistillation, TemporalQuantizer
from stepquant.methods.relation_distillation import output_of, relation_loss, relations
from stepquant.support.errors import StepQuantError


def features(seed: int, shape: tuple[int, ...] = (2, 3, 4, 5)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_relations_by_hand():
    """Two orthogonal pixels: each row is the softmax of (1, 0) / temperature."""
    pixels = torch.tensor([[[[3.0, 0.0]], [[0.0, 0.5]]]], dtype=torch.float64)  # [1, 2, 1, 2]
    found = relations(pixels, 0.5).exp()
    high = math.exp(2) / (math.exp(2) + 1)
    expected = torch.tensor([[[high, 1 - high], [1 - high, high]]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_the_loss_is_the_divergence_of_brute_force(temperature):
    student, teacher = features(0), features(1)
    total = 0.0
    for ours, theirs in zip(student.flatten(2), teacher.flatten(2), strict=True):
        for pixel in range(20):
            rows = []
            for x in (ours, theirs):
                cosines = [
                    float(x[:, pixel] @ x[:, other] / (x[:, pixel].norm() * x[:, other].norm()))
                    for other in range(20)
                ]
                weights = [math.exp(c / temperature) for c in cosines]
                rows.append([w / sum(weights) for w in weights])
            total += sum(t * math.log(t / s) for s, t in zip(*rows, strict=True))
    loss = float(relation_loss(student, teacher, temperature))
    assert loss == pytest.approx(total / (2 * 20), rel=1e-9)


def test_relations_do_not_depend_on_the_strength_of_pixels():
    student, teacher = features(0), features(1)
    strength = 0.1 + torch.rand(2, 1, 4, 5, dtype=torch.float64)
    scaled = relation_loss(student * strength, teacher, 0.1)
    torch.testing.assert_close(scaled, relation_loss(student, teacher, 0.1))
    assert relation_loss(student, student, 0.1).abs() < 1e-12 < relation_loss(student, teacher, 0.1)


def ready(tiny_session, **options):
    session = tiny_session(**{"weights": 2, "activations": 4, "steps": 4, "num": 4, **options})
    TemporalQuantizer().apply(session)
    session.ensure_ranges()
    return session


def window_of(session, rows):
    """Inputs of the given steps, the same images in each."""
    data = session.trajectories
    members = [(data.timestep == data.timesteps[row]).nonzero().flatten() for row in rows]
    index = torch.cat(members)
    return data.take(index)


def outputs(model, site, inputs):
    with output_of(model.get_submodule(site)) as found, torch.no_grad():
        model(inputs.sample, inputs.timestep)
    return found[0]


@pytest.mark.parametrize("rows", [[0], [1, 2], [0, 1, 2]], ids=str)
def test_the_term_is_that_of_features_averaged_over_the_window(rows, tiny_session):
    session = ready(tiny_session)
    inputs = window_of(session, rows)
    site = session.adapter.relation_site(session.float_model)
    smoothed = [
        torch.stack(outputs(model, site, inputs).chunk(len(rows))).mean(dim=0)
        for model in (session.model, session.float_model)
    ]
    expected = 3.0 * relation_loss(*smoothed, 0.2)
    step = RelationDistillation(relation_weight=3.0, temperature=0.2)
    with torch.no_grad():
        _, term = step.losses(session, inputs)
    torch.testing.assert_close(term, expected)


@pytest.mark.parametrize("relation", ["cosine", "l2"])
def test_the_gradient_of_the_term_is_alive(relation, tiny_session):
    """The released code detaches the student's features, and so trains nothing with them."""
    session = ready(tiny_session)
    step = RelationDistillation(relation=relation)
    _, term = step.losses(session, window_of(session, [0, 1]))
    term.backward()
    for name, layer in session.layers().items():
        before_the_site = not name.startswith("conv_out")
        gradient = layer.weight.grad
        assert (gradient is not None and bool(gradient.any())) == before_the_site, name


def test_both_gradient_norms_are_reported_and_the_float_model_has_none(tiny_session):
    session = ready(tiny_session)
    RelationDistillation(rounds=2, batch=2).apply(session)
    norms = session.summary["relation_distillation"]["gradient_norms"]
    assert len(norms) == 2
    assert all(row["task"] > 0 and row["term"] > 0 for row in norms)
    assert all(parameter.grad is None for parameter in session.float_model.parameters())
    assert not any(module._forward_hooks for module in session.float_model.modules())


def test_without_weight_the_term_moves_nothing(tiny_session, one_thread):
    results = []
    for step in (
        RelationDistillation(rounds=1, batch=2, relation_weight=0),
        RelationDistillation(rounds=1, batch=2, relation_weight=0, temperature=3.0),
    ):
        session = ready(tiny_session)
        step.apply(session)
        results.append(session.model.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_a_model_with_features_of_pixels_is_taken(tiny_session):
    session = tiny_session()
    RelationDistillation().check_model(session.float_model, session.adapter, session.scheduler)
    assert not any(module._forward_hooks for module in session.float_model.modules())


@pytest.mark.parametrize(
    ("site", "found"),
    [
        ("time_embedding", r"\(1, 64\)"),
        ("down_blocks.0", "<class 'tuple'>"),
        ("unused", "<class 'NoneType'>"),
    ],
    ids=["no pixels", "no tensor", "never called"],
)
def test_features_without_pixels_are_refused(site, found, tiny_session, monkeypatch):
    session = tiny_session()
    session.float_model.unused = nn.Identity()
    monkeypatch.setattr(session.adapter, "relation_site", lambda _: site, raising=False)
    with pytest.raises(StepQuantError, match=f"found {found} at '{site}': expected features"):
        RelationDistillation().check_model(session.float_model, session.adapter, session.scheduler)


def test_shuffled_steps_are_refused():
    with pytest.raises(ValidationError, match="step 'relation_distillation' is shuffled: expected"):
        RelationDistillation(step_order="shuffled")
