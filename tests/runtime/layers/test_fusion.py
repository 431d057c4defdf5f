"""`fuse_qkv_projections` on packed models; tests/weight_only/test_quantizers.py has the others."""

from __future__ import annotations

import copy

import pytest
import torch

from behaviour_subjects import CALIBRATED, inputs_of, load, predict
from quantize_runs import refused


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", ["flux", "sd"])
@pytest.mark.usefixtures("one_thread")
def test_projections_of_a_packed_model_are_not_fused(name: str, copied: bool) -> None:
    """Those of Flux were asked for a weight; the float model is the control."""
    model = load(next(iter(CALIBRATED)), name)
    model = copy.deepcopy(model) if copied else model
    wanted = predict(model, inputs_of(name))
    message = refused(model.fuse_qkv_projections)
    assert f"on a {type(model).__name__} with the quantized layer '" in message
    assert torch.equal(predict(model, inputs_of(name)), wanted)
    plain = load("float", name)
    before = predict(plain, inputs_of(name))
    plain.fuse_qkv_projections()
    torch.testing.assert_close(predict(plain, inputs_of(name)), before, rtol=1e-3, atol=1e-4)
