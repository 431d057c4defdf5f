"""Every architecture from a float pipeline to images of the packed one on disk."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from architectures import ARCHITECTURES, SMALL, build, pixart, session
from quantize_runs import refused, tree
from stepquant.api import evaluate, inspect, quantize, sample
from stepquant.calibration.trajectories import predict
from stepquant.engines.backend import set_backend
from stepquant.methods.recipe import load_recipe, recipe_names
from stepquant.models.adapter import adapter_for
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.support.progress import Reporter
from stepquant.verbs.bench import bench

STEPS = 3
FEW = {
    "calibration.trajectories": 2,
    "ranges.weights": "minmax",
    "ranges.activations": "minmax",
}
TRAINING = {
    "block_distillation.iterations": 2,
    "block_distillation.samples": 16,
    "block_distillation.batch": 4,
}
RECIPES = {"minmax": FEW, "dilatequant": {**FEW, **TRAINING}}
RUNS = [(name, recipe, bits) for name in ARCHITECTURES for recipe in RECIPES for bits in (8, 4)]
PRODUCTS = {"sd", "sdxl", "dit", "pixart"}  # whose attention has the plain processor

pytestmark = pytest.mark.usefixtures("one_thread")


def run(name, recipe, bits, out=None, model=None, **changes):
    settings = {**RECIPES[recipe], "scheme.attention_bits": bits}
    arguments = {**ARCHITECTURES[name].arguments, **changes}
    return quantize(model or build(name), recipe, bits, bits, out, STEPS, settings, **arguments)


def draw(name, model, num=3, **changes):
    return sample(model, num, STEPS, **{**ARCHITECTURES[name].arguments, **changes})


@pytest.mark.parametrize(
    ("name", "recipe", "bits"),
    RUNS,
    ids=lambda value: f"w{value}a{value}"[-4:] if value in (4, 8) else value,
)
def test_quantize_save_load_sample(name, recipe, bits, tmp_path):
    result = run(name, recipe, bits, tmp_path / "out")
    component = ARCHITECTURES[name].component
    packed = getattr(result.pipeline, component)
    float_model = getattr(build(name), component)

    layers = {n for n, m in packed.named_modules() if isinstance(m, IntegerLayer)}
    plain = {
        n
        for n, m in float_model.named_modules()
        if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert layers == plain
    assert result.record["left_float"] == {}
    assert (result.record["attention_float"] == []) == (name in PRODUCTS)
    assert result.record["times_smaller"] > 1

    images = draw(name, result.pipeline)
    assert bool(images.isfinite().all()) and images.std() > 0.02
    assert torch.equal(draw(name, tmp_path / "out"), images)

    # The float model on its own trajectories: what the packed one should give, and what it does.
    data = session(name).trajectories
    with torch.no_grad():
        wanted, simulated = predict(float_model, data), predict(result.simulation, data)
        set_backend(packed, "reference")
        found = predict(packed, data)
    assert torch.equal(found, simulated)
    error = float((found - wanted).square().mean() / wanted.square().mean())
    assert error < (0.02 if bits == 8 else 1.0)


def test_pixart_that_is_told_the_size_of_the_picture_is_trained(tmp_path):
    """Its embeddings of sizes get two rows for each sample, and are no blocks."""
    torch.manual_seed(0)
    pipeline = pixart(sizes=True)
    call = {**ARCHITECTURES["pixart"].call, **SMALL}
    result = run("pixart", "dilatequant", 4, tmp_path / "out", model=pipeline, call=call)
    blocks = [row["block"] for row in result.record["summary"]["block_distillation"]]
    assert "adaln_single.emb.timestep_embedder" in blocks
    assert not any("resolution" in name or "aspect" in name for name in blocks)
    packed = result.pipeline.transformer.adaln_single.emb.resolution_embedder
    assert isinstance(packed.linear_1, IntegerLayer)
    images = draw("pixart", result.pipeline, call=call)
    assert torch.equal(draw("pixart", tmp_path / "out", call=call), images)


def test_other_prompts_give_other_images():
    images = [draw("sd", build("sd"), prompts=text) for text in ("a cat", "boat")]
    assert not torch.allclose(*images, atol=1e-3)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_negative_prompt_is_one_for_all_images(name):
    images = draw(name, build(name), call={"negative_prompt": "fog"}, num=2)
    assert not torch.allclose(images, draw(name, build(name), num=2), atol=1e-3)


def test_images_follow_their_prompts_whatever_the_batch():
    pipeline = build("sd")
    whole, single = draw("sd", pipeline), draw("sd", pipeline, batch=1)
    torch.testing.assert_close(whole, single, rtol=1e-3, atol=1e-3)


def test_guidance_doubles_the_inputs_of_calibration():
    """The record says how the model was calibrated; so do the trajectories."""
    guided, plain = (run("dit", "minmax", 8, guidance=scale, labels=[1, 2]) for scale in (4.0, 1.0))
    assert guided.record["provenance"]["conditioning"] == {"labels": [1, 2], "guidance": 4.0}
    assert plain.record["provenance"]["conditioning"]["guidance"] == 1.0
    tables = [result.pipeline.transformer.proj_out_2.act_scale for result in (guided, plain)]
    assert not torch.equal(*tables)


def test_flow_is_calibrated_with_its_own_scheduler():
    result = run("flux", "minmax", 8)
    assert result.record["recipe"]["calibration"]["scheduler"] is None
    assert "FlowMatchEulerDiscreteScheduler" in result.record["provenance"]["sampler"]
    grid = result.pipeline.transformer.step_grid
    assert bool((grid <= 1).all()) and len(grid) == STEPS


def test_ddim_that_is_asked_for_is_refused_where_flow_is_matched():
    message = refused(
        lambda: quantize(
            build("sd3"),
            "minmax",
            settings={"calibration.scheduler": "ddim"},
            **ARCHITECTURES["sd3"].arguments,
        )
    )
    assert "scheduler 'ddim' is for a model that predicts noise" in message


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("efficientdm", {"trajectory_distillation.influence_exponent": 0.5}),
        (str(Path(__file__).parent / "recipes" / "allocated.yaml"), {}),
    ],
    ids=["influence", "allocation"],
)
def test_influence_with_guidance_is_refused_before_anything_is_trained(recipe, settings, tmp_path):
    stages = []

    class Noting(Reporter):
        def task(self, description, total):
            stages.append(description)
            return super().task(description, total)

    message = refused(
        lambda: quantize(
            build("dit"),
            recipe,
            out=tmp_path / "out",
            steps=STEPS,
            settings={**settings, "calibration.trajectories": 2},
            guidance=4.0,
            reporter=Noting(True),
        )
    )
    assert "expected no classifier-free guidance" in message
    assert {stage.split()[0] for stage in stages} == {"sampling"}
    assert list(tmp_path.iterdir()) == []


def test_a_class_embedding_that_drops_labels_is_refused():
    pipeline = build("dit")
    pipeline.transformer.train()
    assert "is in training mode and has dropout" in refused(lambda: quantize(pipeline, "minmax"))


def test_a_text_pipeline_asks_for_prompts():
    message = refused(lambda: quantize(build("sd"), "minmax"))
    assert "StableDiffusionPipeline needs prompts and got none" in message
    assert "--prompt" in message


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_the_other_verbs_take_conditions_too(name):
    arguments, pipeline = ARCHITECTURES[name].arguments, build(name)
    packed = run(name, "minmax", 8).pipeline
    record = evaluate(packed, pipeline, num=2, steps=STEPS, **arguments)
    assert len(record["noise_error"]) == STEPS
    assert all(0 < row["relative_mse"] < 0.1 for row in record["noise_error"])
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    rows = inspect(pipeline, steps=STEPS, num=1, **arguments)["layers"]
    assert {row["layer"] for row in rows} >= {
        layer
        for block in [adapter_for(getattr(pipeline, ARCHITECTURES[name].component))]
        for layer in block.input_output_layers(getattr(pipeline, ARCHITECTURES[name].component))
    }
    timed = bench(packed, pipeline, batch=(1,), repeats=1)
    assert len(timed["rows"]) == 2


class Interrupting(Reporter):
    """Presses Ctrl-C once `after` blocks are distilled."""

    def __init__(self, after):
        super().__init__(quiet=True)
        self.after = after

    @contextmanager
    def task(self, description, total):
        with super().task(description, total) as task:
            advance = task.advance

            def press(count=1, note=""):
                advance(count, note)
                self.after -= description == "distilling blocks"
                if self.after == 0 and description == "distilling blocks":
                    raise KeyboardInterrupt

            task.advance = press
            if description == "distilling blocks" and self.after == 0:
                raise KeyboardInterrupt
            yield task


@pytest.mark.parametrize("after", [0, 3], ids=["before the blocks", "after three"])
@pytest.mark.parametrize("name", ["sd", "dit", "flux"])
def test_an_interrupted_run_ends_with_the_same_bytes(name, after, tmp_path, monkeypatch):
    """Conditions are kept with the trajectories; each run opens its pipeline anew."""
    out = tmp_path / "out"
    run(name, "dilatequant", 4, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(name, "dilatequant", 4, out, reporter=Interrupting(after))
    trained = out.with_name("out.work") / "block_distillation"
    assert len(list(trained.glob("*.safetensors"))) == after
    monkeypatch.setattr(
        "stepquant.verbs.calibration_inputs.capture_trajectories", None
    )  # they are there
    if name != "dit":
        message = refused(lambda: run(name, "dilatequant", 4, out, resume=True, prompts="x"))
        assert "holds the work of another job" in message
    run(name, "dilatequant", 4, out, resume=True)
    assert tree(out) == tree(tmp_path / "whole")


def test_sampling_leaves_tokenizers_as_they_were(tmp_path):
    pipeline = build("sd")
    pipeline.tokenizer.save_pretrained(tmp_path / "before")
    draw("sd", pipeline, num=1)
    pipeline.tokenizer.save_pretrained(tmp_path / "after")
    assert tree(tmp_path / "before") == tree(tmp_path / "after")


@pytest.mark.parametrize(
    ("name", "scheduler", "steps"),
    [
        ("sd", "dpm-solver++", 5),
        ("sd", "euler", 4),
        ("sd", "lcm", 4),
        ("dit", "ddim", 7),
        ("flux", "flow-euler", 5),
    ],
)
def test_other_samplers_and_step_counts_than_the_calibrated_ones(name, scheduler, steps):
    pipeline, packed = build(name), run(name, "minmax", 8).pipeline
    arguments = ARCHITECTURES[name].arguments
    images, wanted = (sample(p, 2, steps, 0, scheduler, **arguments) for p in (packed, pipeline))
    assert 0 < float((images - wanted).abs().mean()) < 0.05


def test_diffusers_loads_the_whole_pipeline_by_itself(tmp_path):
    result = run("sd", "minmax", 4, tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt": ["a cat"], "num_inference_steps": 3, "output_type": "np"}
    images = [
        one(**call, generator=torch.Generator().manual_seed(0)).images
        for one in (pipeline, result.pipeline)
    ]
    assert (images[0] == images[1]).all()


SHORT = {
    "iterations": 2,
    "later_iterations": 1,
    "rounds": 1,
    "samples": 16,
    "samples_per_step": 4,
}
OTHERS = [
    pytest.param(name, recipe, marks=pytest.mark.slow if name in ("sd", "sdxl", "sd3") else ())
    for name in ARCHITECTURES
    for recipe in recipe_names()
    if recipe not in (*RECIPES, "weight-only")  # see tests/weight_only/test_conversion.py
]


def shortened(recipe):
    """Settings with which `recipe` does all of its steps, each of them as little as it can."""
    settings = dict(FEW)
    for entry in load_recipe(recipe).to_dict()["steps"]:
        for step, values in entry.items():
            settings |= {f"{step}.{key}": value for key, value in SHORT.items() if key in values}
            if "batch" in values:
                settings[f"{step}.batch"] = 2
            if values.get("steps_together", 1) > 1:
                settings[f"{step}.steps_together"] = 2  # a batch has no more
    if recipe == "tcaq-dm":
        settings["scheme.attention_bits"] = 8
    return settings


@pytest.mark.parametrize(("name", "recipe"), OTHERS)
def test_the_other_recipes_end_in_a_checkpoint_that_computes_what_they_made(name, recipe, tmp_path):
    architecture = ARCHITECTURES[name]
    result = quantize(
        build(name),
        recipe,
        4,
        4,
        tmp_path / "out",
        STEPS,
        shortened(recipe),
        **architecture.arguments,
    )
    images = draw(name, result.pipeline)
    assert bool(images.isfinite().all())
    assert torch.equal(draw(name, tmp_path / "out"), images)
    packed, data = getattr(result.pipeline, architecture.component), session(name).trajectories
    set_backend(packed, "reference")
    with torch.no_grad():
        assert torch.equal(predict(packed, data), predict(result.simulation, data))
    names = [step for entry in result.record["recipe"]["steps"] for step in entry]
    assert list(result.record["summary"]) == names
