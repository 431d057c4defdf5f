"""Models whose config changes after they were quantized: what is saved loads, or nothing is saved.

Varied: the kind of quantized model, freshly quantized, loaded, copied and unpickled; harmless and
harmful changes. Controls: the float model, and the prediction before.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from packed_models import outputs, packed_pipeline, unet
from quantize_runs import refused
from stepquant.api import DynamicConfig, WeightOnlyConfig
from stepquant.weight_only.quantizers import quantize_weights


def quantized_in_memory(folder: Any) -> Any:
    model = unet()
    quantize_weights(model, "it")
    return model


def loaded(config: Any) -> Any:
    def make(folder: Any) -> Any:
        unet().save_pretrained(folder)
        return UNet2DModel.from_pretrained(folder, quantization_config=config)

    return make


def saved_and_loaded(make: Any) -> Any:
    def load(folder: Any) -> Any:
        make(folder / "first").save_pretrained(folder / "second")
        return UNet2DModel.from_pretrained(folder / "second")

    return load


KINDS = {
    "weight-only": quantized_in_memory,
    "weight-only at load": loaded(WeightOnlyConfig(bits=4)),
    "dynamic at load": loaded(DynamicConfig()),
    "packed": lambda folder: packed_pipeline().unet,
}
KINDS |= {f"{name}, loaded": saved_and_loaded(make) for name, make in KINDS.items()}
COPIES = {
    "itself": lambda model: model,
    "a copy": copy.deepcopy,
    "unpickled": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    return KINDS[request.param](tmp_path / "made").eval()


def check_saved(model: Any, folder: Any, **change: Any) -> None:
    wanted = outputs(model)
    model.save_pretrained(folder)
    again = UNet2DModel.from_pretrained(folder).eval()
    assert all(map(torch.equal, outputs(again), wanted))
    assert {key: again.config[key] for key in change} == change


@pytest.mark.parametrize("way", COPIES)
def test_a_changed_config_is_saved_and_loads(model, way, tmp_path):
    model = COPIES[way](model)
    model.register_to_config(sample_size=9, dropout=0.5)
    check_saved(model, tmp_path / "out", sample_size=9, dropout=0.5)
    model.register_to_config(sample_size=10)  # once more, and in the same folder
    check_saved(model, tmp_path / "out", sample_size=10, dropout=0.5)


def test_a_copy_that_changes_leaves_the_original_as_it_was(model, tmp_path):
    copied = copy.deepcopy(model)
    copied.register_to_config(sample_size=9)
    check_saved(copied, tmp_path / "copy", sample_size=9)
    check_saved(model, tmp_path / "out", sample_size=8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"out_channels": 3}, "the tensor 'conv_out."),
        ({"layers_per_block": 2}, "the tensor '"),
        ({"block_out_channels": (16, 17)}, "cannot be built from its config"),
        ({"down_block_types": ("DownBlock2D",)}, "cannot be built from its config"),
    ],
    ids=str,
)
def test_a_config_of_another_model_is_refused_before_anything_is_written(
    model, change, words, tmp_path
):
    before = {key: model.config[key] for key in change}
    model.register_to_config(**change)
    message = refused(lambda: model.save_pretrained(tmp_path / "out"))
    assert words in message and f"register_to_config has changed '{next(iter(change))}'" in message
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    model.register_to_config(**before)  # the remedy
    check_saved(model, tmp_path / "out")
