"""What idioms of diffusers and accelerate read of quantized layers' parameters."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from accelerate import cpu_offload
from diffusers import SD3Transformer2DModel
from torch import nn

from architectures import ARCHITECTURES, build
from stepquant.api import DynamicConfig, WeightOnlyConfig, load, quantize
from stepquant.runtime.layers.dtype_marker import NAME, MarksDtype
from stepquant.runtime.layers.weight_only import weight_only_in_place_of

FEW = {"calibration.trajectories": 1, "ranges.weights": "minmax", "ranges.activations": "minmax"}
CONFIGS = {
    "w8": WeightOnlyConfig,
    "w4": functools.partial(WeightOnlyConfig, bits=4),
    "dynamic": DynamicConfig,
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """SD3 without norms of queries and keys: no float parameter outside of linear layers."""
    folder = tmp_path_factory.mktemp("sd3")
    pipeline, arguments = build("sd3"), ARCHITECTURES["sd3"].arguments
    pipeline.save_pretrained(folder / "float")
    quantize(pipeline, "minmax", 8, 8, folder / "packed", 2, FEW, **arguments)
    return folder


def loaded(folders, kind, dtype):
    if kind == "packed":
        folder, config = folders / "packed" / "transformer", {}
    else:
        folder = folders / "float" / "transformer"
        config = {"quantization_config": CONFIGS[kind]()}
    return SD3Transformer2DModel.from_pretrained(folder, torch_dtype=dtype, **config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["packed", *CONFIGS])
def test_every_module_tells_the_dtype_of_its_model(folders, kind, dtype):
    float_model = SD3Transformer2DModel.from_pretrained(folders / "float" / "transformer")
    model = loaded(folders, kind, dtype)
    assert model.dtype == dtype
    checked = 0
    for name, module in float_model.named_modules():
        if next(module.parameters(), None) is not None:
            first = next(model.get_submodule(name).parameters())
            assert (first.dtype, first.device) == (dtype, torch.device("cpu")), name
            checked += isinstance(model.get_submodule(name), MarksDtype)
    assert checked > 5
    assert model.num_parameters() == float_model.num_parameters()
    assert copy.deepcopy(model).num_parameters() == float_model.num_parameters()
    assert not [key for key in model.state_dict() if NAME in key]


def test_a_dequantized_model_counts_its_own_parameters(folders):
    model = loaded(folders, "packed", torch.float32)
    count = model.num_parameters()
    model.dequantize()
    assert "num_parameters" not in vars(model) and model.num_parameters() == count


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("kind", ["packed", *CONFIGS])
def test_it_is_offloaded_with_equal_numbers(folders, kind, buffers):
    model = loaded(folders, kind, torch.float32)
    generator = torch.Generator().manual_seed(0)
    config = model.config
    sizes = {
        "hidden_states": (1, config.in_channels, 8, 8),
        "encoder_hidden_states": (1, 6, config.joint_attention_dim),
        "pooled_projections": (1, config.pooled_projection_dim),
    }
    inputs = {key: torch.randn(size, generator=generator) for key, size in sizes.items()}
    inputs["timestep"] = torch.tensor([500.0])
    with torch.no_grad():
        wanted = model(**inputs, return_dict=False)[0]
        cpu_offload(model, torch.device("cpu"), offload_buffers=buffers)
        assert torch.equal(model(**inputs, return_dict=False)[0], wanted)


def test_state_dicts_load_strictly_and_casts_reach_the_marker():
    layer = weight_only_in_place_of(nn.Linear(4, 3))
    assert list(layer.state_dict()) == ["weight", "bias", "weight_scale"]
    other = weight_only_in_place_of(nn.Linear(4, 3))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    assert next(other.parameters()).dtype == torch.float32
    assert next(other.to(torch.bfloat16).parameters()).dtype == torch.bfloat16
    assert [name for name, _ in other.named_parameters(recurse=False)] == ["weight", "bias"]


def test_saved_files_know_nothing_of_it(folders, tmp_path):
    load(folders / "packed").save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "transformer" / "config.json").read_text())
    assert NAME not in json.dumps(index)
    name = "transformer/diffusion_pytorch_model.safetensors"
    again, first = (folder / name for folder in (tmp_path / "again", folders / "packed"))
    assert again.read_bytes() == first.read_bytes()
