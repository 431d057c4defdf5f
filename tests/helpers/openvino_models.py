"""A denoiser of one layer, and when tests of OpenVINO are skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepquant.quantizers import StepContext
from stepquant.runtime.kernels import onednn
from stepquant.runtime.ops.layer_spec import LayerSpec


def installed() -> bool:
    try:
        import openvino  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def saturates() -> bool:
    on_cpu, spec = torch.device("cpu"), LayerSpec("linear", 1, 1, 8, 8)
    return onednn.ONEDNN.why_not(spec, on_cpu) is None and onednn.pairs_saturate()


needs_openvino = pytest.mark.skipif(not installed(), reason="openvino is not installed")
needs_vnni = pytest.mark.skipif(saturates(), reason="8 bits are refused without VNNI")


class Denoiser(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Tensor, more: Any = None) -> Tensor:
        return self.layer(sample)


def around(layer: nn.Module, context: StepContext) -> Denoiser:
    denoiser = Denoiser(layer).eval()
    context.attach(denoiser)
    return denoiser
