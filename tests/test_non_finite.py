"""NaN and infinity: where the float model gives NaN, quantized ones do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from torch import Tensor, nn

from architectures import ARCHITECTURES, build
from fast_models import packed
from layer_cases import input_for, layers, seeded
from recorded_models import inputs, predict
from stepquant.api import DynamicConfig, WeightOnlyConfig
from stepquant.engines.captured_calls import RecordedDenoiser
from stepquant.models.adapter import adapter_for
from stepquant.models.calling import call_denoiser
from stepquant.models.non_finite import NonFiniteError, NonFiniteSamples, let_through, report
from stepquant.quantizers import QuantAttention, StepContext
from stepquant.runtime.layers.weight_only import weight_only_in_place_of
from stepquant.runtime.ops import native
from stepquant.simulation.packing import pack_attention, pack_layer

BAD = [float("nan"), float("inf"), -float("inf")]

pytestmark = pytest.mark.usefixtures("one_thread")


def bad_samples(y: Tensor) -> list[bool]:
    """Which samples are NaN throughout; none is so in part."""
    nan = torch.isnan(y.flatten(1))
    assert torch.equal(nan.any(dim=1), nan.all(dim=1))
    return nan.any(dim=1).tolist()


@torch.no_grad()
def prediction(model: nn.Module, bad: float | None, where: str) -> Tensor:
    """Of two samples; the second one's input is `bad` in one place."""
    sample, at, conditions = adapter_for(model).random_inputs(model, 2)
    if bad is not None:
        texts = [v for k, v in conditions.items() if k == "encoder_hidden_states"]
        target = sample if where == "sample" else texts[0]
        target[1].view(-1)[3] = bad
    return call_denoiser(model, sample, at, conditions)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["sample", "text"])
@pytest.mark.parametrize("name", ["sd", "pixart", "sd3"])
def test_a_packed_denoiser_gives_nan_where_the_float_one_does(
    name: str, where: str, bad: float
) -> None:
    float_model = getattr(build(name), ARCHITECTURES[name].component)
    fast = packed(name, bits=4)
    good = prediction(fast, None, where)
    found = prediction(fast, bad, where)
    assert torch.isnan(prediction(float_model, bad, where)[1]).any()
    assert bad_samples(found) == [False, True]
    assert torch.equal(found[0], good[0])  # the other sample is what it was, bit for bit


class Breaks:
    """Makes `bad` one value of the second sample in what a module returns."""

    def __init__(self, module: nn.Module, bad: float) -> None:
        self._bad = bad
        self.handle = module.register_forward_hook(self._break)

    def _break(self, module: nn.Module, args: Any, output: Any) -> Any:
        prediction = (output[0] if isinstance(output, tuple) else output).clone()
        prediction[(1, *(0,) * (prediction.dim() - 1))] = self._bad
        return (prediction, *output[1:]) if isinstance(output, tuple) else prediction


@pytest.mark.parametrize("with_native", [True, False])
@pytest.mark.parametrize(
    ("name", "within"),
    [
        ("sd", "conv_in"),
        ("sd", "time_embedding"),
        ("sd", "down_blocks.0.resnets.0"),
        ("sd", "mid_block.attentions.0"),
        ("dit", "transformer_blocks.0.norm1"),
        ("pixart", "transformer_blocks.0.attn1"),
        ("sd3", "time_text_embed"),
        ("flux", "transformer_blocks.0.ff"),
    ],
)
def test_what_is_not_finite_within_a_denoiser_is_let_through(
    name: str, within: str, with_native: bool, monkeypatch: Any
) -> None:
    if not with_native:
        monkeypatch.setattr(native, "library", lambda: None)
    fast = packed(name, bits=4)
    good = prediction(fast, None, "")
    for bad in BAD:
        breaks = Breaks(fast.get_submodule(within), bad)
        found = prediction(fast, None, "")
        breaks.handle.remove()
        assert bad_samples(found) == [False, True]
        assert torch.equal(found[0], good[0])
    assert torch.equal(prediction(fast, None, ""), good)


@pytest.mark.parametrize("frames", [2, 3])
def test_frames_in_the_batch_are_of_their_sample(frames: int) -> None:
    class Folds(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            report(x.repeat_interleave(frames, dim=0))
            return torch.nan_to_num(x)

    model = Folds()
    NonFiniteSamples.attach(model)
    x = torch.ones(2, 3)
    assert bad_samples(model(x, timestep=torch.tensor(0))) == [False, False]
    x[1, 2] = torch.nan
    assert bad_samples(model(x, timestep=torch.tensor(0))) == [False, True]


def test_a_failed_call_leaves_nothing_behind() -> None:
    fast = packed("sd", bits=4)
    good = prediction(fast, None, "")

    def fail(*_: Any) -> None:
        raise ValueError("of the test")

    breaks = Breaks(fast.conv_in, torch.nan)
    handle = fast.mid_block.register_forward_hook(fail)
    with pytest.raises(ValueError, match="of the test"):
        prediction(fast, None, "")
    breaks.handle.remove()
    handle.remove()
    assert torch.equal(prediction(fast, None, ""), good)


@pytest.mark.skipif(native.why_no_products() is not None, reason="calls are not captured here")
@pytest.mark.parametrize("name", ["sd", "pixart"])
@torch.no_grad()
def test_captured_calls_let_it_through_and_stay_captured(name: str) -> None:
    fast = packed(name, bits=4)
    captured = RecordedDenoiser(fast)
    given = [inputs(fast, 2, seed, step) for seed, step in ((0, 0), (1, 1), (2, 2), (3, 0))]
    for each in given[:3]:
        predict(captured, each)
    assert captured.recordings == 1 and captured.reasons == []
    wanted = predict(captured, given[3])
    for bad in BAD:
        sample, more = given[3]
        broken = sample.clone()
        broken[1].view(-1)[3] = bad
        found = predict(captured, (broken, more))
        assert bad_samples(found) == [False, True] and torch.equal(found[0], wanted[0])
        assert torch.equal(predict(captured, given[3]), wanted)
    assert captured.recordings == 1 and captured.reasons == []


@pytest.mark.skipif(native.why_no_products() is not None, reason="calls are not captured here")
def test_a_call_that_is_not_finite_is_captured_the_next_time() -> None:
    fast = packed("sd", bits=4)
    captured = RecordedDenoiser(fast)
    sample, more = inputs(fast, 2, 0, 0)
    broken = sample.clone()
    broken[1].view(-1)[3] = torch.nan
    for _ in range(3):
        assert bad_samples(predict(captured, (broken, more))) == [False, True]
    assert captured.recordings == 0 and captured.reasons == []
    for number in range(4):
        given = inputs(fast, 2, number, number % 3)
        assert torch.equal(predict(captured, given), predict(fast, given))
    assert captured.recordings == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "dit"])
def test_a_compiled_denoiser_lets_inputs_through_and_refuses_the_rest(name: str) -> None:
    fast = packed(name, bits=4)
    compiled = torch.compile(fast, fullgraph=True)
    good = prediction(compiled, None, "")
    found = prediction(compiled, torch.nan, "sample")
    assert bad_samples(found) == [False, True] and torch.equal(found[0], good[0])
    norm = next(m for m in fast.modules() if isinstance(m, nn.GroupNorm) or m is fast.pos_embed)
    next(norm.parameters()).data.view(-1)[0] = torch.nan
    if native.available():
        with pytest.raises(NonFiniteError, match="that is not compiled predicts NaN"):
            prediction(compiled, None, "")


@pytest.mark.parametrize("config", [DynamicConfig(), WeightOnlyConfig(bits=4)])
def test_so_do_models_that_are_quantized_at_load(config: Any, tmp_path: Any) -> None:
    build("sd").save_pretrained(tmp_path)
    mapping = PipelineQuantizationConfig(quant_mapping={"sd": config})
    unet = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=mapping).unet
    for bad in BAD:
        found = prediction(unet, bad, "sample")
        assert torch.isnan(found[1]).any() and torch.isfinite(found[0]).all()


@layers
@pytest.mark.parametrize("bad", BAD)
@torch.no_grad()
def test_a_dynamic_layer_lets_it_through(kind: str, bad: float) -> None:
    layer = weight_only_in_place_of(seeded(kind), kinds=DynamicConfig.kinds)
    x = input_for(kind)
    wanted = layer(x)
    x[1].view(-1)[5] = bad
    found = layer(x)
    assert torch.isnan(found[1]).any()
    assert torch.equal(found[[0, 2]], wanted[[0, 2]])


@layers
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("with_native", [True, False])
@torch.no_grad()
def test_a_packed_layer_on_its_own_lets_it_through(
    with_native: bool, kind: str, bad: float, simulate: Any, context: StepContext, monkeypatch: Any
) -> None:
    if not with_native:
        monkeypatch.setattr(native, "library", lambda: None)
    layer, x = pack_layer(simulate(seeded(kind), 4)), input_for(kind)
    for timestep in (torch.tensor(10), torch.tensor([40, 0, 10])):
        context.set_timestep(timestep)
        wanted, broken = layer(x), x.clone()
        broken[1].view(-1)[5] = bad
        found = layer(broken)
        assert bad_samples(found) == [False, True, False]
        assert torch.equal(found[[0, 2]], wanted[[0, 2]])


def test_finite_values_whose_sum_is_not_stay_what_they_are() -> None:
    x = torch.full((2, 8), 3e38)
    y = torch.arange(6.0).view(2, 3)
    assert let_through(y, x) is not None and torch.equal(let_through(y, x), y)
    x[0, 0] = torch.nan
    assert bad_samples(let_through(y, x)) == [True, False]


@pytest.mark.parametrize("operand", range(3))
@pytest.mark.parametrize("bad", BAD)
@torch.no_grad()
def test_quantized_products_let_it_through(operand: int, bad: float, context: StepContext) -> None:
    built = QuantAttention(8, 8, context)
    built.resize(5)
    built.quantizing = True
    attention = pack_attention(built)
    context.set_timestep(20)
    operands = [torch.randn(2, 2, 5, 8) for _ in range(3)]
    wanted = attention(*operands)
    operands[operand][1, 0, 2, 3] = bad
    found = attention(*operands)
    assert torch.isnan(found[1, 0]).any()
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1, 1], wanted[1, 1])
