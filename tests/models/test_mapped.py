"""A float model whose weights stay on disk against the same one in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from architectures import ARCHITECTURES, build, condition_unet
from quantize_runs import FAST, refused, tree
from stepquant.api import quantize
from stepquant.models.adapter import adapter_for
from stepquant.models.calling import call_denoiser
from stepquant.models.mapped import FloatState, Mapped, named_weights, open_mapped
from stepquant.pipelines import opening
from stepquant.simulation.simulate import check_finite_weights
from stepquant.support.work_folder import fingerprint

STEPS = 3

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["float32", "bfloat16"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    model = condition_unet().to(getattr(torch, request.param))
    model.save_pretrained(tmp_path / "unet", max_shard_size="20KB")
    return tmp_path / "unet"


@torch.no_grad()
def run(model):
    return call_denoiser(model, *adapter_for(model).random_inputs(model, 2))


def test_it_computes_what_the_loaded_model_does(folder):
    loaded = UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32)
    model = open_mapped(folder, "it")
    assert torch.equal(run(model), run(loaded))
    assert torch.equal(run(copy.deepcopy(model)), run(loaded))
    assert model.dtype == torch.float32 and not model.training
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert layers and all(isinstance(layer, Mapped) for layer in layers)
    assert all(tensor.dim() < 2 for tensor in model.state_dict().values())


def test_its_state_is_that_of_the_loaded_model_tensor_by_tensor(folder):
    loaded = UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32)
    state = FloatState(open_mapped(folder, "it"))
    wanted = loaded.state_dict()
    assert len(state) == len(wanted) and set(state) == set(wanted)
    assert fingerprint(state) == fingerprint(wanted)
    assert state.sizes() == {name: tensor.numel() for name, tensor in wanted.items()}
    assert {n for n, _ in named_weights(open_mapped(folder, "it"))} == set(wanted)


def test_a_layer_that_is_loaded_is_a_plain_one(folder):
    model = open_mapped(folder, "it")
    plain = model.conv_in.loaded()
    assert type(plain) is nn.Conv2d and isinstance(model.conv_in, Mapped)
    assert plain.weight.dtype == torch.float32 and torch.equal(plain.weight, model.conv_in.weight)
    assert set(plain.state_dict()) == {"weight", "bias"}


def test_a_weight_that_is_no_number_is_named(folder):
    path = next(p for p in folder.glob("*.safetensors") if "conv_in.weight" in load_file(p))
    tensors = load_file(path)
    tensors["conv_in.weight"][0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    message = refused(lambda: check_finite_weights(open_mapped(folder, "it")))
    assert "parameter 'conv_in.weight' holds NaN" in message


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_quantize_writes_the_same_bytes_whether_the_float_model_is_mapped(
    name, tmp_path, monkeypatch
):
    pipeline = build(name)
    getattr(pipeline, ARCHITECTURES[name].component).to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path / "float")
    opened = []

    def spy(*args):
        opened.append(open_mapped(*args))
        return opened[-1]

    monkeypatch.setattr(opening, "open_mapped", spy)
    for threshold in (0, 10**9):
        monkeypatch.setattr(opening, "MAP_FROM", threshold)
        quantize(
            tmp_path / "float",
            "dilatequant",
            4,
            8,
            tmp_path / str(threshold),
            STEPS,
            FAST,
            **ARCHITECTURES[name].arguments,
        )
    assert len(opened) == 1
    assert tree(tmp_path / "0") == tree(tmp_path / "1000000000")
