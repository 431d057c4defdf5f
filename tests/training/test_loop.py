"""The training loop of `training/`, on a network of one layer."""

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

TRAINING = Path(__file__).resolve().parents[2] / "training"


@pytest.fixture
def loop(monkeypatch):
    monkeypatch.syspath_prepend(str(TRAINING))
    return importlib.import_module("loop")


def train_to(loop, images, folder, copies=None, **settings):
    torch.manual_seed(0)
    net = nn.Linear(4, 4)

    def loss_at(rng):
        x = torch.randn(8, 4, generator=rng)
        return (net(x) - x).square().mean()

    settings = loop.Settings(**{"batch": 8, "lr": 1e-2, "ema": 0.99, "seed": 0, **settings})
    execution = loop.Execution(folder, "cpu", save_every=1, bf16=False)
    budget = loop.Budget(images=images, minutes=None)
    loop.train("net", net, loss_at, settings, budget, execution, copies)
    return net


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(loop, tmp_path):
    train_to(loop, 16, tmp_path / "parts", schedule="constant")
    resumed = train_to(loop, 32, tmp_path / "parts", schedule="constant")
    whole = train_to(loop, 32, tmp_path / "whole", schedule="constant")
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    checkpoints = [load_file(tmp_path / part / "net.safetensors") for part in ("parts", "whole")]
    torch.testing.assert_close(*checkpoints, rtol=0, atol=0)


def test_other_settings_are_refused_on_resume(loop, tmp_path):
    train_to(loop, 8, tmp_path)
    with pytest.raises(SystemExit, match="give the same settings"):
        train_to(loop, 16, tmp_path, lr=2e-2)


def test_copies_are_the_average_and_do_not_disturb_the_run(loop, tmp_path):
    copied = {}

    def write(net, path):
        copied[path.name] = {key: value.clone() for key, value in net.state_dict().items()}
        net.half()

    copies = loop.Copies(every=12, write=write)
    copying = train_to(loop, 32, tmp_path / "copying", copies, schedule="constant")
    plain = train_to(loop, 32, tmp_path / "plain", schedule="constant")
    torch.testing.assert_close(copying.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert [*copied] == ["16", "24"]  # the first steps that reach 12 and 24 images
    shorter = train_to(loop, 16, tmp_path / "shorter", schedule="constant")
    torch.testing.assert_close(copied["16"], dict(shorter.state_dict()), rtol=0, atol=0)
