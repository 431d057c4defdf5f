"""`device_map` of `from_pretrained` for quantized models.

Varied: integer, weight-only and dynamic models, quantized before or while they are loaded; one
device, a map of the float model's parts, "auto" with and without enough memory, the disk.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextModel

from architectures import ARCHITECTURES, build
from packed_models import outputs, packed_pipeline
from quantize_runs import FAST_MINMAX, refused
from stepquant.api import DynamicConfig, WeightOnlyConfig, quantize
from stepquant.checkpoint.save import save_pipeline
from stepquant.checkpoint.validate import STEP_GRID_NAME
from stepquant.models.input_bypass import SLOPES_NAME

CONFIGS = {"weight-only at load": WeightOnlyConfig, "dynamic at load": DynamicConfig}
KINDS = ["integer", "weight-only", *CONFIGS]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device_map")
    build("sd").save_pretrained(folder / "float")
    arguments = {"steps": 2, "settings": FAST_MINMAX, **ARCHITECTURES["sd"].arguments}
    quantize(build("sd"), "minmax", 8, 8, out=folder / "integer", **arguments)
    quantize(folder / "float", "weight-only", out=folder / "weight-only")
    return folder


def load(folders, kind, **arguments):
    if kind in CONFIGS:
        arguments["quantization_config"] = CONFIGS[kind]()
        kind = "float"
    return UNet2DConditionModel.from_pretrained(folders / kind, subfolder="unet", **arguments)


@torch.no_grad()
def run(unet):
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in [(2, 4, 8, 8), (2, 8, 16)])
    return unet(x, 10, text).sample


def parts():
    """A map that a user makes for the float model."""
    return {name: "cpu" for name, _ in build("sd").unet.named_children()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_of_devices_changes_no_number(folders, kind):
    wanted = run(load(folders, kind))
    for places in ({"": "cpu"}, parts(), "auto"):
        assert torch.equal(run(load(folders, kind, device_map=places)), wanted)


def test_a_map_needs_no_place_for_the_tensors_of_steps(folders, tmp_path):
    given = parts()
    unet = load(folders, "integer", device_map=given)
    assert unet.hf_device_map == {STEP_GRID_NAME: "cpu", **given}
    assert given == parts()  # the caller's
    again = load(folders, "integer", device_map=unet.hf_device_map)
    assert torch.equal(run(again), run(unet))

    pipeline = packed_pipeline(bypass=True)
    folder = save_pipeline(pipeline, "unet", tmp_path / "bypass")
    places = {name: "cpu" for name, _ in pipeline.unet.named_children()}
    loaded = UNet2DModel.from_pretrained(folder, subfolder="unet", device_map=places)
    assert loaded.hf_device_map[SLOPES_NAME] == "cpu"
    for found, wanted in zip(outputs(loaded), outputs(pipeline.unet), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_disk_is_refused(folders, tmp_path, kind):
    more = {"offload_folder": tmp_path}
    for places, words in (
        ({"": "disk"}, "device_map puts all layers on 'disk': expected devices with memory"),
        ({**parts(), "mid_block": "disk"}, "puts layers such as 'mid_block' on 'disk'"),
    ):
        message = refused(lambda places=places: load(folders, kind, device_map=places, **more))
        assert words in message
    tight = {"device_map": "auto", "max_memory": {"cpu": "20KB"}}
    assert "allow more max_memory" in refused(lambda: load(folders, kind, **tight, **more))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_on_the_disk_is_refused(folders, kind):
    message = refused(lambda: load(folders, kind, offload_state_dict=True))
    assert "load without offload" in message


@pytest.mark.parametrize("config", CONFIGS.values())
def test_text_encoders_take_a_map_and_refuse_the_disk(folders, tmp_path, config):
    def load_text(place):
        return CLIPTextModel.from_pretrained(
            folders / "float",
            subfolder="text_encoder",
            device_map={"": place},
            offload_folder=tmp_path,
            quantization_config=config(),
        )

    assert load_text("cpu").dtype == torch.float32
    assert "puts all layers on 'disk'" in refused(lambda: load_text("disk"))
