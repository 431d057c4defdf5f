"""Attention with its products left to us against diffusers' own processor."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import Tensor, nn

from stepquant.models.attention_processor import ProductsProcessor, why_products_stay_float
from stepquant.quantizers import QuantAttention, StepContext, StepGrid


def attention(**changes: object) -> Attention:
    torch.manual_seed(0)
    built = Attention(**{"query_dim": 16, "heads": 2, "dim_head": 8, "bias": True, **changes})
    for module in built.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return built.eval()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def products() -> QuantAttention:
    """Products that do not quantize yet."""
    return QuantAttention(8, 8, StepContext(StepGrid(torch.arange(3))))


IMAGE, TOKENS, OTHER = (2, 16, 3, 4), (2, 12, 16), (2, 5, 16)
MASK = torch.zeros(2, 1, 5)
MASK[0, :, 3:] = MASK[1, :, 1:2] = -1e4
CASES = {
    "image": ({}, IMAGE, {}),
    "tokens": ({}, TOKENS, {}),
    "one head": ({"heads": 1, "dim_head": 16}, IMAGE, {}),
    "group norm and residual": (
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0},
        IMAGE,
        {},
    ),
    "group norm of tokens": ({"norm_num_groups": 4, "residual_connection": True}, TOKENS, {}),
    "cross attention": (
        {"cross_attention_dim": 16},
        TOKENS,
        {"encoder_hidden_states": random(*OTHER)},
    ),
    "normed cross attention": (
        {"cross_attention_dim": 16, "cross_attention_norm": "layer_norm"},
        IMAGE,
        {"encoder_hidden_states": random(*OTHER)},
    ),
    "mask": (
        {"cross_attention_dim": 16},
        TOKENS,
        {"encoder_hidden_states": random(*OTHER), "attention_mask": MASK},
    ),
    "mask of yes and no": (
        {"cross_attention_dim": 16},
        TOKENS,
        {"encoder_hidden_states": random(*OTHER), "attention_mask": MASK == 0},
    ),
    "norms of queries and keys": ({"qk_norm": "layer_norm"}, TOKENS, {}),
    "spatial norm": (
        {"spatial_norm_dim": 8, "residual_connection": True},
        (2, 32, 3, 4),
        {"temb": random(2, 8, 3, 4)},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize(("settings", "shape", "inputs"), CASES.values(), ids=CASES)
def test_float_products_are_those_of_diffusers(settings, shape, inputs, caplog):
    # SpatialNorm has 32 groups.
    module = attention(**({"query_dim": 32, **settings} if shape[1] == 32 else settings))
    assert why_products_stay_float(module) is None
    x = random(*shape)
    expected = module(x, **inputs)
    module.set_processor(ProductsProcessor(products()))
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        found = module(x, **inputs)
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not caplog.records


@torch.no_grad()
def test_a_mask_of_yes_and_no_is_one_for_quantized_products_too():
    """To them a mask is what is added to the scores."""
    module, seen = attention(cross_attention_dim=16), []

    class Spy(nn.Module):
        def forward(self, query, key, value, mask):
            seen.append(mask)
            return query

    module.set_processor(ProductsProcessor(Spy()))
    module(random(*TOKENS), encoder_hidden_states=random(*OTHER), attention_mask=MASK == 0)
    (mask,) = seen
    expected = torch.where(MASK == 0, 0.0, -torch.inf)[:, None].expand(-1, 2, -1, -1)
    assert torch.equal(mask, expected)


@torch.no_grad()
def test_the_older_plain_processor_computes_the_same():
    module = attention(norm_num_groups=4, processor=AttnProcessor())
    assert why_products_stay_float(module) is None
    expected = module(random(*IMAGE))
    module.set_processor(ProductsProcessor(products()))
    torch.testing.assert_close(module(random(*IMAGE)), expected, rtol=0, atol=1e-6)


class Doubling(AttnProcessor2_0):
    """Made from a plain processor, and not plain."""

    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


def fused() -> Attention:
    module = attention()
    module.fuse_projections()
    return module


REFUSED = {
    "no attention": (lambda: nn.Linear(2, 2), "attention of the class Linear"),
    "another processor": (
        lambda: attention(processor=SlicedAttnProcessor(1)),
        "attention with the processor SlicedAttnProcessor",
    ),
    "a class made from a plain processor": (
        lambda: attention(processor=Doubling()),
        "attention with the processor Doubling",
    ),
    "unscaled scores": (lambda: attention(scale_qk=False), "attention with unscaled scores"),
    "norms that the processor leaves out": (
        lambda: attention(qk_norm="layer_norm", processor=AttnProcessor()),
        "attention whose processor leaves out its norms of queries and keys",
    ),
    "causal": (
        lambda: attention(is_causal=True),
        "causal attention, or attention with added keys and values",
    ),
    "added keys and values": (
        lambda: attention(added_kv_proj_dim=16),
        "causal attention, or attention with added keys and values",
    ),
    "no output projection": (
        lambda: attention(pre_only=True),
        "attention without an output projection",
    ),
    "shared keys": (
        lambda: attention(kv_heads=1),
        "attention with shared or fused projections",
    ),
    "fused projections": (fused, "attention with shared or fused projections"),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_products_that_stay_float_have_a_reason(build, reason):
    assert why_products_stay_float(build()) == reason
