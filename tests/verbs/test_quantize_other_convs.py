"""A homemade UNet of convolutions that no kernel takes: quantized, saved, loaded, dequantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepquant.api import DenoiserPipeline, load_module, quantize
from stepquant.engines.slow_paths import slow_paths
from stepquant.models.rewritten_conv import RewrittenConv
from stepquant.runtime.layers.integer import IntegerConv2d, IntegerLayer
from stepquant.runtime.ops import native
from stepquant.support.errors import StepQuantError

FEW: dict[str, Any] = {"calibration.trajectories": 2}
REWRITTEN = ["down", "grouped", "rows", "stem", "up"]


class HomemadeUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 64)
        self.stem = nn.Conv2d(1, 64, 3, padding=1, padding_mode="reflect")
        self.down = nn.Conv2d(64, 64, 4, 2, 1, padding_mode="circular")
        self.grouped = nn.Conv2d(128, 128, 3, padding="same", groups=2)
        self.thin = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.rows = nn.Conv1d(64, 64, 3, padding=1)
        self.up = nn.ConvTranspose2d(64, 64, 4, 2, 1)
        self.head = nn.Conv2d(64, 1, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        at = torch.as_tensor(timestep).float().reshape(-1, 1) / 1000
        h = self.stem(x) + self.time(at)[:, :, None, None]
        d = nn.functional.silu(self.down(h))
        d = self.thin(self.grouped(torch.cat([d, -d], dim=1))[:, :64])
        d = self.rows(d.flatten(2)).view_as(d)
        return self.head(h + self.up(nn.functional.silu(d)))


def pipeline(**more: Any) -> DenoiserPipeline:
    torch.manual_seed(0)
    return DenoiserPipeline(HomemadeUNet().eval(), shape=(1, 8, 8), **more)


@torch.no_grad()
def predict(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return model(torch.randn(2, 1, 8, 8, generator=generator), torch.tensor(10))


@pytest.mark.parametrize("recipe", ["minmax", "dilatequant"])
def test_they_are_quantized_exactly_like_other_convs(recipe: str, tmp_path: Path) -> None:
    source = pipeline()
    settings = {**FEW, "block_distillation.iterations": 2} if recipe == "dilatequant" else FEW
    result = quantize(source, recipe, 8, 8, tmp_path / "packed", 4, settings)
    assert list(result.record["left_float"]) == ["thin"]
    packed = result.pipeline.denoiser
    inner = [layer for layer in packed.modules() if isinstance(layer, IntegerLayer)]
    assert len(inner) == 8 and type(source.denoiser.up) is nn.ConvTranspose2d
    assert isinstance(packed.up, RewrittenConv) and isinstance(packed.up.convs[0], IntegerConv2d)
    torch.testing.assert_close(predict(packed), predict(result.simulation), rtol=0, atol=1e-5)
    wanted = predict(source.denoiser)  # ranges are those of four steps of an untrained net
    assert (predict(packed) - wanted).norm() < 0.3 * wanted.norm()

    library = native.library()
    on_avx2 = library is not None and library.product_level == "avx2"
    slow = [note for note in slow_paths(packed) if "transposed" in note]
    assert slow == [] if not on_avx2 else slow[0].startswith("1 of the layers are transposed")

    loaded = load_module(HomemadeUNet(), tmp_path / "packed")
    assert torch.equal(predict(loaded), predict(packed))
    config: Any = loaded.hf_quantizer.quantization_config  # type: ignore[union-attr]
    assert config.rewritten_layers == REWRITTEN


def test_they_keep_their_names_for_settings() -> None:
    settings = {
        **FEW,
        "scheme.overrides": [{"pattern": "up", "weight_bits": 4, "activation_bits": 8}],
        "scheme.modules_to_not_convert": ["rows"],
    }
    result = quantize(pipeline(float_layers=["grouped"]), "minmax", 8, 8, None, 4, settings)
    packed = result.pipeline.denoiser
    assert packed.up.convs[0].spec.weight_bits == 4
    assert type(packed.rows) is nn.Conv1d
    left = dict(result.record["left_float"])
    assert {name.partition(".")[0] for name in left} == {"rows", "grouped", "thin"}


def test_a_folder_of_another_module_is_refused(tmp_path: Path) -> None:
    quantize(pipeline(), "minmax", 8, 8, tmp_path / "packed", 4, FEW)
    other = HomemadeUNet()
    other.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1))
    with pytest.raises(StepQuantError, match="rewrites the layer 'up', which is Sequential"):
        load_module(other, tmp_path / "packed")
