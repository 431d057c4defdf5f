"""Which layers a block may run on codes, by the code of the refusal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layer_cases import seeded
from stepquant.runtime.blocks.eligibility import is_encodable, untouched, why_no_codes
from stepquant.runtime.kernels.onednn import ONEDNN
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.simulation.packing import pack_layer
from stepquant.support.refusal import Refusal, RefusalCode

NO_ONEDNN = ONEDNN.why_not(LayerSpec("linear", 8, 8, 4, 4), torch.device("cpu"))


class Anything:
    def take(self, error: torch.Tensor) -> None:
        del error


@pytest.fixture
def layer(simulate):
    return pack_layer(simulate(seeded("conv3x3"), 4, 4, (7, 5)))


@pytest.mark.skipif(NO_ONEDNN is not None, reason=str(NO_ONEDNN))
def test_a_plain_layer_is_run_on_codes(layer):
    assert why_no_codes(layer) is None
    assert why_no_codes(None) is None


def test_what_stands_in_the_way(layer):
    several = Refusal(RefusalCode.LAYER, "a layer with several input parts")
    assert why_no_codes(layer, parts=1) == several
    refusal = why_no_codes(nn.Linear(2, 2))
    assert refusal == Refusal(RefusalCode.LAYER, "a layer of the class Linear")
    handle = layer.register_forward_hook(lambda *_: None)
    assert not untouched(layer) and why_no_codes(layer).code is RefusalCode.HOOK
    handle.remove()
    layer.bypass = Anything()
    assert why_no_codes(layer).code is RefusalCode.INPUT_BYPASS
    layer.bypass, layer.lora = None, nn.ModuleDict()
    assert why_no_codes(layer).code is RefusalCode.LORA
    layer.lora = None
    layer.drop_layout()
    layer.backend = "reference"
    assert why_no_codes(layer) == Refusal(RefusalCode.BACKEND, "the backend 'reference'")


def test_what_is_encoded():
    assert is_encodable(torch.ones(1)) and is_encodable(torch.ones(1, dtype=torch.bfloat16))
    assert not is_encodable(torch.ones(1, dtype=torch.float16))
    assert not is_encodable(torch.ones(1, device="meta"))
    seen = torch.compile(lambda x: x + is_encodable(x), backend="eager", fullgraph=True)
    assert seen(torch.zeros(1)) == 1
