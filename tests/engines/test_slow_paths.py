"""What is slower than it could be is told, with the reason and a count."""

from __future__ import annotations

import psutil
import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, build
from fast_models import packed
from stepquant.api import quantize
from stepquant.engines.backend import set_backend
from stepquant.engines.slow_paths import slow_paths
from stepquant.runtime.kernels import onednn
from stepquant.runtime.ops import native

needs_vnni = pytest.mark.skipif(onednn.pairs_saturate(), reason="no VNNI")
FEW = {"calibration.trajectories": 1, "ranges.weights": "minmax", "ranges.activations": "minmax"}


def told(model):
    """Without what is so on the machine of the tests."""
    return [
        note
        for note in slow_paths(model)
        if "processors" not in note and str(native.why_not()) not in note
    ]


def test_a_model_without_packed_layers_has_none():
    assert slow_paths(nn.Linear(2, 2)) == []


@needs_vnni
def test_none_where_nothing_is_slower():
    assert told(packed("sd")) == []


@pytest.mark.skipif((psutil.cpu_count(logical=False) or 1) < 2, reason="needs two cores")
def test_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        notes = [note for note in slow_paths(packed("sd")) if "processors" in note]
    finally:
        torch.set_num_threads(before)
    assert len(notes) == 1 and notes[0].startswith("torch uses 1 of ")


@needs_vnni
def test_blocks_by_reason():
    fast = packed("sd")
    fast.mid_block.train()
    fast.mid_block.attentions[0].eval()
    fast.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: None)
    assert told(fast) == [
        "1 of 25 blocks run the code of diffusers layer by layer: a hook",
        "2 of 25 blocks run the code of diffusers layer by layer: training mode",
        "each call runs its Python code, because calls are not recorded: a hook",
    ]


@needs_vnni
def test_a_backend_that_was_asked_for():
    fast = packed("sd")
    set_backend(fast, "reference")
    assert told(fast) == [
        "91 layer inputs run on the reference kernel: the backend 'reference' was chosen",
        "25 of 25 blocks run the code of diffusers layer by layer: the backend 'reference'",
    ]


def test_float16():
    fast = packed("sd")
    nn.Module.to(fast, torch.float16)
    assert any(
        note.startswith("torch.float16 activations are rounded in several") for note in told(fast)
    )


@needs_vnni
def test_an_architecture_without_fused_blocks():
    arguments = ARCHITECTURES["flux"].arguments
    model = quantize(build("flux"), "minmax", 8, 8, None, 2, FEW, **arguments).pipeline.transformer
    assert told(model) == [
        "FluxTransformer2DModel has no blocks with a fused form: it runs layer by layer"
    ]


def test_layers_that_lie_elsewhere_are_not_asked():
    """As between two calls under sequential offloading."""
    fast = packed("sd").to("meta")
    assert slow_paths(fast) == []
