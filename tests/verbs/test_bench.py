from __future__ import annotations

import json
import math

import pytest
import torch

from stepquant.api import sample
from stepquant.engines.backend import set_backend, with_backend
from stepquant.runtime.layers.integer import IntegerLayer, is_packed
from stepquant.runtime.layers.resident import set_memory_mode, weight_bytes_resident
from stepquant.support.errors import StepQuantError
from stepquant.verbs.bench import bench, denoiser_call
from stepquant.verbs.quantize import quantize


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    return tiny_pipeline()


@pytest.fixture(scope="module")
def packed(pipeline):
    settings = {"calibration.trajectories": 1}
    return quantize(pipeline, "minmax", 8, 8, steps=2, settings=settings).pipeline


@pytest.fixture(scope="module")
def record(packed, pipeline):
    return bench(packed, pipeline, batch=(1, 2), repeats=2)


def test_a_record_has_a_row_for_each_model_and_batch(record):
    assert record["kind"] == "integer"
    assert record.keys() == {
        "kind",
        "rows",
        "kernels",
        "openvino",
        "weights",
        "threads",
        "cpu_capability",
        "peak_memory_mb",
        "slow_paths",
    }
    assert record["openvino"] is None
    assert [(row["batch"], row["model"]) for row in record["rows"]] == [
        (1, "float32"),
        (1, "quantized"),
        (2, "float32"),
        (2, "quantized"),
    ]
    for row in record["rows"]:
        assert row.keys() == {"batch", "model", "median_ms", "p10_ms", "p90_ms", "times_faster"}
        numbers = [value for value in row.values() if not isinstance(value, str)]
        assert all(math.isfinite(number) and number > 0 for number in numbers)
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_speed_is_told_beside_the_float_model_at_the_same_batch(record):
    for first in (0, 2):
        ours, theirs = record["rows"][first + 1], record["rows"][first]
        assert theirs["times_faster"] == 1.0
        assert ours["times_faster"] == pytest.approx(theirs["median_ms"] / ours["median_ms"])


def test_kernels_are_counted_for_every_part_of_every_layer(record, packed):
    parts = sum(len(m.splits) for m in packed.unet.modules() if isinstance(m, IntegerLayer))
    assert sum(record["kernels"].values()) == parts == 58


def test_a_backend_can_be_asked_for(tiny_pipeline, packed, pipeline):
    record = bench(packed, pipeline, batch=(1,), repeats=1, backend="reference")
    assert record["kernels"] == {"reference": 58}
    set_backend(packed.unet, "auto")


def test_openvino_is_timed_beside_the_packed_layers(pipeline):
    pytest.importorskip("openvino", reason="openvino is not installed")
    everywhere = {"pattern": "*", "weight_bits": 4, "activation_bits": 8}  # w8a8 wants VNNI
    settings = {"calibration.trajectories": 1, "scheme.overrides": [everywhere]}
    packed = quantize(pipeline, "minmax", 4, 8, steps=2, settings=settings).pipeline
    record = bench(packed, pipeline, batch=(1, 2), repeats=1, backend="openvino")
    names = ["float32", "quantized", "openvino"]
    assert [row["model"] for row in record["rows"]] == 2 * names
    found = record["openvino"]
    assert found["device"] == "CPU" and sum(found["kernels"].values()) >= 58
    assert [entry["batch"] for entry in found["faster"]] == [1, 2]
    for entry in found["faster"]:
        times = {r["model"]: r["median_ms"] for r in record["rows"] if r["batch"] == entry["batch"]}
        assert times[entry["model"]] == min(times["quantized"], times["openvino"])


def test_a_layer_does_not_run_on_openvino_by_itself(packed):
    with pytest.raises(StepQuantError, match="'openvino' runs a whole denoiser, not its layers"):
        set_backend(packed.unet, "openvino")


def test_a_pipeline_is_given_a_backend(packed, pipeline):
    assert with_backend(pipeline, "auto") is pipeline
    other = with_backend(packed, "reference")
    assert {layer.backend for layer in layers_of(other)} == {"reference"}
    assert {layer.backend for layer in layers_of(packed)} == {"auto"}
    assert with_backend(other, "reference") is other
    assert {name for m in layers_of(other) for name in m.kernel_names()} == {"reference"}
    with pytest.raises(StepQuantError, match="UNet2DModel has no packed layer: expected a model"):
        with_backend(pipeline, "onednn")


def layers_of(pipeline):
    return [m for m in pipeline.unet.modules() if isinstance(m, IntegerLayer)]


@pytest.mark.parametrize("mode", ["fast", "low"])
def test_what_weights_take_in_memory_is_told(packed, pipeline, mode):
    weights = bench(packed, pipeline, batch=(1,), repeats=1, memory=mode)["weights"]
    found = weight_bytes_resident(packed.unet)
    assert weights == {
        "memory": mode,
        "resident_bytes": found.resident,
        "float32_bytes": found.float32,
        "times_smaller": found.times_smaller,
    }
    assert found.float32 > found.resident
    set_memory_mode(packed.unet, "fast")


@pytest.mark.parametrize("backend", ["auto", "onednn"])
@torch.no_grad()
def test_backends_agree(packed, backend):
    """Strictly layer by layer: through a model, a value at a tie may fall to another code."""
    call, calls = denoiser_call(packed.unet, 2, 500), []
    set_backend(packed.unet, "reference")
    hooks = [
        layer.register_forward_hook(lambda layer, args, y: calls.append((layer, args[0], y)))
        for layer in layers_of(packed)
    ]
    expected = call()[0]
    for hook in hooks:
        hook.remove()
    set_backend(packed.unet, backend)
    found = call()[0]
    assert {id(layer) for layer, _, _ in calls} == {id(layer) for layer in layers_of(packed)}
    for layer, x, y in calls:
        assert (layer(x) - y).abs().max() < 1e-5 * y.abs().max()
    set_backend(packed.unet, "auto")
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_call_is_of_the_models_own_size_and_without_gradients(tiny_unet):
    unet = tiny_unet(sample_size=(16, 8), in_channels=3)
    (output,) = denoiser_call(unet, 2, 500)()
    assert output.shape == (2, 1, 16, 8)
    assert not output.requires_grad


def test_calls_see_the_same_input_each_time(tiny_unet):
    unet = tiny_unet()
    first, second = denoiser_call(unet, 2, 500), denoiser_call(unet, 2, 500)
    assert torch.equal(first()[0], second()[0])
    assert not torch.equal(first()[0], denoiser_call(unet, 2, 20)()[0])


def test_a_packed_model_is_told_from_a_float_one(packed, pipeline):
    assert is_packed(packed.unet)
    assert not is_packed(pipeline.unet)


def test_a_model_that_is_not_quantized_is_refused(pipeline):
    with pytest.raises(StepQuantError, match="has no packed layer: expected a folder that"):
        bench(pipeline, pipeline, batch=(1,), repeats=1)


def test_a_reference_that_is_quantized_is_refused(packed):
    with pytest.raises(StepQuantError, match="is quantized: expected the float model"):
        bench(packed, packed, batch=(1,), repeats=1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch": (1, 0)}, "batch size is 0: expected at least 1"),
        ({"backend": "cuda"}, "unknown backend 'cuda': expected auto or one of native"),
        ({"memory": "tiny"}, "unknown memory mode 'tiny': expected fast or low"),
        ({"repeats": 0}, "repeats is 0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(packed, pipeline, changes, told):
    try:
        with pytest.raises(StepQuantError, match=told):
            bench(packed, pipeline, **{"batch": (1,), "repeats": 1, **changes})
    finally:
        set_backend(packed.unet, "auto")


def test_sampling_leaves_the_backend_as_it_was(packed):
    sample(packed, 1, 2, backend="reference")
    assert {layer.backend for layer in layers_of(packed)} == {"auto"}
    assert {name for m in layers_of(packed) for name in m.kernel_names()} != {"reference"}
