"""A recipe that quantizes attention's products too, from end to end."""

from __future__ import annotations

import contextlib

import pytest
import torch

from quantize_runs import FAST, SMALL, left, refused, tree
from stepquant.methods.recipe import parse_recipe
from stepquant.pipelines.opening import open_pipeline
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.integer_attention import PackedAttention
from stepquant.support.progress import Reporter
from stepquant.verbs.quantize import quantize

pytestmark = pytest.mark.usefixtures("one_thread")

SITE = "mid_block.attentions.0"
STEPS = ("temporal_quantizer", "adaptive_softmax", "block_distillation")
MINE = {
    "name": "mine",
    "description": "attention in integers",
    "scheme": {"weight_bits": 4, "attention_bits": 8, "probability_bits": 4},
    "steps": list(STEPS),
}
GRIDS = {"adaptive_softmax.step_groups": 2, "adaptive_softmax.grid": "error"}


class Interrupting(Reporter):
    """Presses Ctrl-C when the step after `stage` begins; keeps the lines."""

    def __init__(self, stage: str | None = None):
        super().__init__(quiet=True)
        self.stage, self.lines = stage, []

    def line(self, text):
        self.lines.append(text)

    @contextlib.contextmanager
    def task(self, description, total):
        with super().task(description, total) as task:
            yield task
        if description == self.stage:
            raise KeyboardInterrupt


def run(model, out=None, reporter=None, resume=False, **settings):
    recipe = parse_recipe(MINE, "mine")
    return quantize(
        model, recipe, None, None, out, 3, {**FAST, **GRIDS, **settings}, 2, resume, reporter
    )


@pytest.fixture(scope="module")
def model(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("float") / "pipeline"
    tiny_pipeline(**SMALL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "out"
    result = run(model, out)
    torch.set_num_threads(before)
    return result, out


@torch.no_grad()
def outputs(unet):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return [unet(x, t).sample for t in (torch.tensor(660), torch.tensor([0, 330]))]


def test_on_the_reference_kernels_packed_is_simulated(done):
    result, _ = done
    packed = result.pipeline.unet
    for module in packed.modules():
        if isinstance(module, IntegerLayer):
            module.drop_layout()
            module.backend = "reference"
    for a, b in zip(outputs(packed), outputs(result.simulation), strict=True):
        assert torch.equal(a, b)
    for module in packed.modules():
        if isinstance(module, IntegerLayer):
            module.drop_layout()
            module.backend = "auto"


def test_what_is_read_back_is_what_was_written(done):
    result, out = done
    for a, b in zip(outputs(open_pipeline(out).unet), outputs(result.pipeline.unet), strict=True):
        assert torch.equal(a, b)


def test_the_record_names_what_is_float(done):
    result, _ = done
    assert result.record["attention_float"] == []
    assert result.record["recipe"]["scheme"]["attention_bits"] == 8
    groups = result.record["summary"]["adaptive_softmax"]["groups"]
    assert [(group["attention"], group["steps"]) for group in groups] == [
        (SITE, [0, 1]),
        (SITE, [2, 2]),
    ]
    (products,) = (m for m in result.pipeline.unet.modules() if isinstance(m, PackedAttention))
    assert (products.bits, products.probability_bits, products.steps) == (8, 4, 3)
    chosen = [group["log2"] for group in groups]
    assert products.probability_log2.tolist() == [chosen[0], chosen[0], chosen[1]]


@pytest.mark.parametrize(
    "stage", ["searching ranges", "choosing softmax grids", "distilling blocks"]
)
def test_after_ctrl_c_the_same_bytes_come_out(model, done, tmp_path, stage):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(model, out, Interrupting(stage))
    assert left(tmp_path) == ["out.work"]
    run(model, out, resume=True)
    assert tree(out) == tree(done[1])


def test_products_that_cannot_be_quantized_are_told_and_stay_float(tiny_pipeline):
    pipeline, reporter = tiny_pipeline(**SMALL), Interrupting()
    pipeline.unet.get_submodule(SITE).is_causal = True
    result = run(pipeline, reporter=reporter, **{"block_distillation.iterations": 0})
    assert result.record["attention_float"] == [SITE]
    assert result.record["summary"]["adaptive_softmax"] == {"groups": []}
    told = f"the products of attention '{SITE}' stay float: causal attention"
    assert any(line.startswith(told) for line in reporter.lines)


def test_the_step_without_attention_bits_is_refused_before_anything_is_kept(model, tmp_path):
    settings = {"scheme.attention_bits": None, "scheme.probability_bits": 8}
    sentence = refused(lambda: run(model, tmp_path / "out", **settings))
    assert sentence.startswith("step 'adaptive_softmax' got a scheme that leaves attention's")
    assert left(tmp_path) == []
