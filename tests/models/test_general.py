from __future__ import annotations

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, SanaTransformer2DModel
from torch import nn

from plain_denoiser import SHAPE, denoiser
from quantize_runs import FAST, refused
from stepquant.api import DenoiserPipeline, quantize, sample
from stepquant.models.general import ModuleAdapter
from stepquant.simulation.scheme import Scheme
from stepquant.support.errors import StepQuantError

WIDTH = 8


def example(batch):
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *SHAPE, generator=generator), torch.full((batch,), 0.5), {}


class Odd(nn.Module):
    """What cannot be simulated, or trained by itself, in one way or another."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(SHAPE[0], WIDTH, 1)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.positions = nn.Linear(2, WIDTH)  # of tokens, whatever the batch
        self.by_token = nn.Linear(WIDTH, WIDTH)  # on rows of samples and tokens
        self.shared = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.up = nn.ConvTranspose2d(WIDTH, WIDTH, 1)
        self.spare = nn.Linear(3, 3)
        self.head = nn.Conv2d(WIDTH, SHAPE[0], 1)

    def forward(self, sample, timestep):
        x = self.stem(sample) + timestep.view(-1, 1, 1, 1) / 1000
        size = x.shape[2:]
        places = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1])).float()
        tokens = x.flatten(2).transpose(1, 2) + self.positions(places / size[0])
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        tokens = self.by_token(tokens.flatten(0, 1)).view_as(tokens)
        tokens = self.shared(self.shared(tokens))
        return self.head(self.up(tokens.transpose(1, 2).unflatten(2, size)))


class Nested(nn.Module):
    """Stages that give lists of features, which other stages take."""

    class Down(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(WIDTH, WIDTH, 1)

        def forward(self, x, table):
            return self.conv(x) + table, [x]

    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2 * WIDTH, WIDTH, 1)

        def forward(self, x, *, skips):
            return self.conv(torch.cat([x, skips["skips"][0]], dim=1))

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.stem = nn.Conv2d(SHAPE[0], WIDTH, 1)
        self.down, self.up = nn.ModuleList([self.Down()]), nn.ModuleList([self.Up()])
        self.table = nn.Parameter(torch.randn(WIDTH, 1, 1))
        self.head = nn.Conv2d(WIDTH, SHAPE[0], 1)

    def forward(self, sample, timestep):
        time = self.time(timestep.float().view(-1, 1))
        x = self.stem(sample) + time[:, :, None, None]
        x, skips = self.down[0](x, self.table)
        return self.head(self.up[0](x, skips={"skips": skips}))


@pytest.fixture(scope="module")
def odd():
    torch.manual_seed(0)
    return Odd().eval()


@pytest.fixture(scope="module")
def nested():
    torch.manual_seed(0)
    return Nested().eval()


def test_the_input_layer_is_the_first_that_sees_the_sample():
    """The time's embedding is computed before it."""
    assert ModuleAdapter(example).input_output_layers(denoiser()) == {"stem", "head"}


def test_layers_that_cannot_be_simulated_stay_float_with_the_reason(odd):
    bits, left_float = Scheme().layer_bits(odd, ModuleAdapter(example))
    assert left_float == {
        "attention.out_proj": "its weight is used without a call of the layer",
        "positions": "its input has no rows that belong to samples",
        "up": "layer of the class ConvTranspose2d",
        "spare": "its weight is used without a call of the layer",
    }
    assert bits.keys() == {"stem", "by_token", "shared.0", "head"}


def test_what_is_used_twice_or_has_rows_of_tokens_is_no_block(odd):
    assert ModuleAdapter(example).blocks(odd) == ["stem", "head"]


def test_an_odd_module_is_quantized_all_the_same(odd, one_thread):
    pipeline = DenoiserPipeline(odd, SHAPE)
    result = quantize(pipeline, "dilatequant", 8, 8, steps=3, settings=FAST)
    images, near = (sample(p, 4, 3) for p in (pipeline, result.pipeline))
    assert 0 < float((images - near).abs().mean()) < 0.02


def test_blocks_may_give_and_take_nested_tensors(nested, one_thread):
    adapter = ModuleAdapter(example)
    assert adapter.blocks(nested) == ["down.0", "up.0", "time", "stem", "head"]
    pipeline = DenoiserPipeline(nested, SHAPE)
    result = quantize(pipeline, "dilatequant", 8, 8, steps=3, settings=FAST)
    losses = result.record["summary"]["block_distillation"]
    assert [row["block"] for row in losses] == ["time", "stem", "down.0", "up.0", "head"]
    assert all(row["loss_after"] <= row["loss_before"] < 0.01 for row in losses)


def test_relations_are_of_the_last_block_before_the_output():
    assert ModuleAdapter(example).relation_site(denoiser()) == "body.2"


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"block_patterns": ["bode.*"]}, "block pattern 'bode.\\*' matches no module"),
        ({"block_patterns": ["body"]}, "the module 'body' is called 0 times"),
        ({"float_patterns": ["hed"]}, "pattern 'hed' of layers that stay float matches none"),
    ],
)
def test_patterns_that_fit_nothing_are_told(patterns, message):
    adapter = ModuleAdapter(example, **patterns)
    with pytest.raises(StepQuantError, match=message):
        adapter.blocks(denoiser())
        adapter.float_layers(denoiser())


def test_a_module_without_layers_is_told():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, sample, timestep):
            return sample * self.gain

    message = refused(lambda: quantize(DenoiserPipeline(Bare(), SHAPE), "minmax"))
    assert "Bare has no linear or conv layer that processes the sample" in message


def test_a_module_whose_calls_depend_on_the_batch_is_told():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

        def forward(self, sample, timestep):
            return self.one(sample) if len(sample) == 2 else self.other(sample)

    with pytest.raises(StepQuantError, match="Moody calls different modules for 3 and 2 samples"):
        ModuleAdapter(example).float_layers(Moody())


def test_a_module_without_a_timestep_is_told():
    class Timeless(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, sample, t):
            return self.conv(sample)

    message = refused(lambda: quantize(DenoiserPipeline(Timeless(), SHAPE), "minmax"))
    assert "arguments (sample, t): expected one called 'timestep'" in message


def sana():
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        patch_size=1,
    )


def aura_flow():
    return AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=256,
    )


def of_texts(denoiser, noise, steps, generators):
    """Flow along straight paths, each image with a text of its own."""
    x, texts = noise, torch.randn(8, 6, 16, generator=torch.Generator().manual_seed(0))
    for t in torch.linspace(1000, 0, steps + 1)[:-1]:
        text = {"encoder_hidden_states": texts[: len(x)], "return_dict": False}
        x = x - denoiser(x, timestep=t.expand(len(x)), **text)[0] / steps
    return x[:, :3].sigmoid()


@pytest.mark.parametrize(
    ("model", "blocks", "left_float"),
    [
        (sana, ["transformer_blocks.0", "transformer_blocks.1"], 2),  # its depthwise convs
        (aura_flow, ["joint_transformer_blocks.0", "single_transformer_blocks.0"], 0),
    ],
)
def test_architectures_of_diffusers_without_an_adapter(model, blocks, left_float, one_thread):
    torch.manual_seed(0)
    pipeline = DenoiserPipeline(model().eval(), (4, 8, 8), draw=of_texts)
    result = quantize(pipeline, "dilatequant", 8, 8, steps=3, settings=FAST)
    trained = [row["block"] for row in result.record["summary"]["block_distillation"]]
    assert [name for name in trained if "blocks" in name] == blocks
    assert len(result.record["left_float"]) == left_float
    images, near = (sample(p, 4, 3) for p in (pipeline, result.pipeline))
    assert 0 < float((images - near).abs().mean()) < 0.02 < float(images.std())
