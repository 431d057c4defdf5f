from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import nn

from architectures import ARCHITECTURES, build
from plain_denoiser import SHAPE, denoiser
from quantize_runs import FAST, FAST_MINMAX, refused, tree
from stepquant.api import (
    DenoiserPipeline,
    bench,
    evaluate,
    general_adapter,
    inspect,
    load,
    load_module,
    quantize,
    sample,
)
from stepquant.checkpoint.save import save_pipeline
from stepquant.engines.backend import set_backend
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter

LAYERS = 2 + 1 + 4 + 2 + 1
pytestmark = pytest.mark.usefixtures("one_thread")


def pipeline(module=None, **changes):
    return DenoiserPipeline(module or denoiser(), SHAPE, **changes)


class Stopping(Reporter):
    def task(self, description, total):
        if description == "distilling blocks":
            raise KeyboardInterrupt
        return super().task(description, total)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    out = tmp_path_factory.mktemp("module") / "packed"
    return quantize(pipeline(), "dilatequant", 4, 8, out, 3, FAST), out


def test_ten_lines_of_user_code(packed):
    result, out = packed
    images = sample(result.pipeline, num=3, steps=3)
    again = load_module(denoiser(seed=1), out)
    assert images.shape == (3, *SHAPE) and images.std() > 0.05
    assert torch.equal(sample(pipeline(again), num=3, steps=3), images)
    assert sum(isinstance(m, IntegerLayer) for m in again.modules()) == LAYERS
    assert result.record["left_float"] == {}
    assert result.record["times_smaller"] > 1


def test_every_tensor_is_the_files(packed):
    result, out = packed
    ours, theirs = (
        module.state_dict() for module in (load_module(denoiser(1), out), result.pipeline.denoiser)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype, name


def test_a_loaded_module_saves_the_same_bytes(packed, tmp_path):
    _, out = packed
    save_pipeline(pipeline(load_module(denoiser(1), out)), "denoiser", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(out)


def test_the_packed_module_computes_what_was_simulated(packed):
    result, _ = packed
    module = result.pipeline.denoiser
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    set_backend(module, "reference")
    with torch.no_grad():
        for timestep in (torch.tensor([666, 666, 0, 333]), torch.tensor(0)):
            assert torch.equal(module(x, timestep), result.simulation(x, timestep))


def test_blocks_are_those_of_the_structure(packed):
    result, _ = packed
    blocks = [row["block"] for row in result.record["summary"]["block_distillation"]]
    assert blocks == ["time.0", "time.2", "stem", "body.0", "body.1", "body.2", "head"]


def test_all_verbs_take_it(packed):
    result, _ = packed
    record = evaluate(result.pipeline, pipeline(), num=2, steps=3)
    assert record["paired_psnr_db"] > 15
    assert len(inspect(pipeline(), steps=3, num=1)["layers"]) == LAYERS
    assert len(inspect(result.pipeline)["layers"]) == LAYERS
    assert len(bench(result.pipeline, pipeline(), batch=(1,), repeats=1)["rows"]) == 2


def euler_like(denoiser, noise, steps, generators):
    """A sampler of the user's own, with a label for each image, on times from 1 to 0."""
    x, times = noise, torch.linspace(1, 0, steps + 1)
    label = torch.arange(len(x)) % 3
    for now, then in itertools.pairwise(times):
        x = x + (then - now) * denoiser(x, timestep=now.expand(len(x)), label=label)
    return x.sigmoid()


def test_a_function_of_ones_own_may_draw(tmp_path):
    own = pipeline(denoiser(classes=3), draw=euler_like)
    result = quantize(own, "minmax", 8, 8, tmp_path / "out", 4, FAST_MINMAX)
    assert result.record["recipe"]["calibration"]["scheduler"] is None
    assert "OwnSampler, 4 steps" in result.record["provenance"]["sampler"]
    assert result.pipeline.denoiser.step_grid.tolist() == [1.0, 0.75, 0.5, 0.25]
    images = sample(own, 3, 4)
    near = sample(result.pipeline, 3, 4)
    assert 0 < float((images - near).abs().max()) < 0.05
    again = load_module(denoiser(1, classes=3), tmp_path / "out")
    assert torch.equal(sample(pipeline(again, draw=euler_like), 3, 4), near)


def test_an_image_does_not_depend_on_the_batch():
    whole, single = (sample(pipeline(scheduler=DDPMScheduler()), 3, 3, batch=b) for b in (3, 1))
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler]
)
def test_schedulers_without_noise_or_scales_of_their_own_draw_too(kind):
    images, other = (sample(pipeline(scheduler=kind()), 2, 3, seed, None) for seed in (0, 5))
    assert bool(images.isfinite().all())
    assert not torch.equal(images, other)


def test_flow_of_ones_own_is_quantized_with_its_scheduler():
    own = pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    result = quantize(own, "minmax", 8, 8, steps=3, settings=FAST_MINMAX)
    images, near = (sample(p, 2, 3) for p in (own, result.pipeline))
    assert 0 < float((images - near).abs().mean()) < 0.02


def test_its_components_are_denoiser_and_scheduler():
    own = pipeline()
    assert own.components == {"denoiser": own.denoiser, "scheduler": own.scheduler}


def test_a_defect_in_the_users_code_is_seen_as_it_is():
    def broken(denoiser, noise, steps, generators):
        return denoiser.no_such_part(noise)

    with pytest.raises(AttributeError, match="no_such_part"):
        quantize(pipeline(draw=broken), "minmax")


def test_schedulers_that_scale_the_input_are_asked_to():
    images = sample(pipeline(scheduler=EulerDiscreteScheduler()), 2, 3, scheduler=None)
    assert bool(images.isfinite().all())


def test_blocks_can_be_named_and_layers_left_float():
    own = pipeline(blocks=["body.*"], float_layers=["time.*"])
    message = refused(lambda: quantize(own, "minmax", settings=FAST_MINMAX, steps=2))
    assert "'body.0.film' lies in the block 'body.0'" in message
    own = pipeline(blocks=["body.[0-9]"], float_layers=["time.*"])
    result = quantize(own, "dilatequant", 4, 4, steps=2, settings=FAST)
    assert set(result.record["left_float"]) == {"time.0", "time.2"}
    blocks = {row["block"] for row in result.record["summary"]["block_distillation"]}
    assert blocks == {"stem", "body.0", "body.1", "body.2", "head"}


def test_a_diffusers_pipeline_of_unknown_architecture_takes_the_general_adapter(tmp_path):
    """Here one that is known, so that the rest of it is tested elsewhere."""
    arguments = ARCHITECTURES["sd"].arguments
    adapter = general_adapter(build("sd"), **arguments)
    result = quantize(
        build("sd"), "dilatequant", 8, 8, tmp_path / "out", 2, FAST, adapter=adapter, **arguments
    )
    assert result.record["left_float"] == {}
    images = sample(result.pipeline, 2, 2, **arguments)
    assert torch.equal(sample(tmp_path / "out", 2, 2, **arguments), images)
    assert set(adapter.input_output_layers(build("sd").unet)) == {"conv_in", "conv_out"}


def test_other_verbs_take_an_adapter_too(monkeypatch):
    """Of an architecture that has none of its own."""
    monkeypatch.setattr("stepquant.models.adapter.ADAPTERS", {})
    arguments, own = ARCHITECTURES["sd"].arguments, build("sd")
    adapter = general_adapter(own, **arguments)
    packed = quantize(own, "minmax", settings=FAST_MINMAX, steps=2, adapter=adapter, **arguments)
    assert "no adapter for" in refused(lambda: inspect(own, steps=2, num=1, **arguments))
    record = inspect(own, steps=2, num=1, adapter=adapter, **arguments)
    assert len(record["layers"]) > 10
    timed = bench(packed.pipeline, own, batch=(1,), repeats=1, adapter=adapter)
    assert len(timed["rows"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (8, 8)}, r"shape of a sample is \(8, 8\)"),
        ({"scheduler": DDPMScheduler(), "draw": euler_like}, "one of the two"),
    ],
)
def test_what_makes_no_pipeline_is_told(changes, message):
    with pytest.raises(StepQuantError, match=message):
        DenoiserPipeline(**{"denoiser": denoiser(), "shape": SHAPE, **changes})


def test_a_scheduler_is_refused_where_the_users_function_draws():
    own = pipeline(denoiser(classes=3), draw=euler_like)
    assert "draws with its own function" in refused(lambda: sample(own, 1, 1, scheduler="ddim"))


def test_a_function_that_gives_no_images_is_told():
    own = pipeline(draw=lambda denoiser, noise, steps, generators: None)
    assert "returned NoneType: expected images [1, C, H, W]" in refused(lambda: sample(own, 1, 1))


def test_a_model_of_diffusers_in_a_pipeline_of_ones_own_loads_as_a_module(tiny_unet, tmp_path):
    """No class of diffusers can build the pipeline, so that its folder would be of no use."""
    own = DenoiserPipeline(tiny_unet(), (1, 16, 16))
    result = quantize(own, "minmax", 4, 8, tmp_path / "out", 2, FAST_MINMAX)
    assert list(tree(tmp_path / "out")) == ["denoiser/config.json", "denoiser/model.safetensors"]
    again = load_module(tiny_unet(), tmp_path / "out")
    images = sample(result.pipeline, 2, 2)
    assert torch.equal(sample(DenoiserPipeline(again, (1, 16, 16)), 2, 2), images)


@pytest.mark.parametrize("changes", [{"float_layers": ["time.*"]}, {"blocks": ["body.0"]}])
def test_a_run_with_other_blocks_or_float_layers_is_not_resumed(tmp_path, changes):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(pipeline(), "dilatequant", 4, 8, out, 2, FAST, reporter=Stopping(quiet=True))
    other = pipeline(**changes)
    assert "holds the work of another job" in refused(
        lambda: quantize(other, "dilatequant", 4, 8, out, 2, FAST, resume=True)
    )


def test_a_folder_of_a_module_says_how_to_load_it(packed):
    assert "call load_module on it" in refused(lambda: load(packed[1]))


def test_another_module_is_refused(packed, tmp_path):
    wider = denoiser()
    wider.head = nn.Conv2d(16, 2, 3, padding=1)
    assert "'head." in refused(lambda: load_module(wider, packed[1]))
    assert "does not have" in refused(lambda: load_module(nn.Linear(2, 2), packed[1]))
    assert "expected the config of a packed module" in refused(
        lambda: load_module(denoiser(), tmp_path)
    )


def test_a_changed_file_is_refused(packed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(packed[1], folder)
    path = folder / "denoiser" / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"]["layers"]["head"]["weight_bits"] = 7
    path.write_text(json.dumps(values))
    refused(lambda: load_module(denoiser(), folder))
    path = folder / "denoiser" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert refused(lambda: load_module(denoiser(), folder))
