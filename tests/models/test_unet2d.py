from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from stepquant.methods.equivalent_scaling import fold_into_producer
from stepquant.models.adapter import adapter_for
from stepquant.models.unet2d import UNet2DAdapter
from stepquant.support.errors import StepQuantError

ADAPTER = UNet2DAdapter()
CONFIGS = {
    "tiny": {},
    "three levels, deeper, growing": {
        "block_out_channels": (8, 16, 24),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "shrinking": {
        "block_out_channels": (24, 8),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
    },
    "resnets that resample": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "resampling block types": {
        "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "no middle": {"mid_block_type": None},
    "one level": {
        "block_out_channels": (16,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
    },
    "skips of the image": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 32),
        "norm_num_groups": 8,
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    },
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def unet(request, tiny_unet):
    return tiny_unet(**request.param)


@torch.no_grad()
def forward(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, model.config.in_channels, 16, 16, generator=generator)
    return model(x, torch.tensor([700, 20])).sample


def layers(model):
    return {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }


def test_every_layer_is_in_exactly_one_block(unet):
    blocks = ADAPTER.blocks(unet)
    assert len(set(blocks)) == len(blocks)
    for layer in layers(unet):
        holders = [block for block in blocks if layer == block or layer.startswith(f"{block}.")]
        assert len(holders) == 1, (layer, holders)


def test_blocks_are_resnets_attentions_resamplers_and_single_layers(unet):
    kinds = {type(unet.get_submodule(block)).__name__ for block in ADAPTER.blocks(unet)}
    assert {"TimestepEmbedding", "Conv2d", "ResnetBlock2D"} <= kinds
    known = {"TimestepEmbedding", "Conv2d", "ResnetBlock2D", "Attention"}
    assert kinds <= known | {"Downsample2D", "Upsample2D"}


def test_input_and_output_layers_are_the_outer_convs(unet):
    assert ADAPTER.input_output_layers(unet) == {"conv_in", "conv_out"}
    assert ADAPTER.input_output_layers(unet) < layers(unet)


def test_split_parts_add_up_to_the_in_channels(unet):
    splits = ADAPTER.skip_splits(unet)
    assert splits
    for name, parts in splits.items():
        layer = unet.get_submodule(name)
        assert len(parts) == 2
        assert min(parts) > 0
        assert sum(parts) == layer.in_channels


def test_splits_stand_for_all_first_convs_and_shortcuts_of_the_decoder(unet):
    expected = set()
    for b, block in enumerate(unet.up_blocks):
        for r, resnet in enumerate(block.resnets):
            expected.add(f"up_blocks.{b}.resnets.{r}.conv1")
            if resnet.conv_shortcut is not None:
                expected.add(f"up_blocks.{b}.resnets.{r}.conv_shortcut")
    assert set(ADAPTER.skip_splits(unet)) == expected


def test_splits_fall_where_backbone_and_skip_are_joined(unet):
    """What every decoder resnet gets against what its block was given and has popped."""
    splits = ADAPTER.skip_splits(unet)
    inputs, given, results, handles = {}, {}, {}, []

    def enter(b, args, kwargs):
        names = ("hidden_states", "res_hidden_states_tuple")
        given[b] = {**dict(zip(names, args, strict=False)), **kwargs}

    def leave(key, args, output):
        inputs[key], results[key] = args[0], output

    for b, block in enumerate(unet.up_blocks):
        handles.append(
            block.register_forward_pre_hook(
                lambda _m, args, kwargs, b=b: enter(b, args, kwargs), with_kwargs=True
            )
        )
        for r, resnet in enumerate(block.resnets):
            handles.append(
                resnet.register_forward_hook(lambda _m, args, y, key=(b, r): leave(key, args, y))
            )
    forward(unet)
    for handle in handles:
        handle.remove()
    assert len(inputs) == sum(len(block.resnets) for block in unet.up_blocks)
    for (b, r), x in inputs.items():
        hidden, skip = x.split(splits[f"up_blocks.{b}.resnets.{r}.conv1"], dim=1)
        assert torch.equal(skip, given[b]["res_hidden_states_tuple"][-1 - r])
        if r == 0:
            assert torch.equal(hidden, given[b]["hidden_states"])
        else:
            assert hidden.shape[1] == results[b, r - 1].shape[1]
    for name, parts in splits.items():
        if name.endswith("conv_shortcut"):
            assert parts == splits[name.replace("conv_shortcut", "conv1")]


def test_attention_sites_are_all_attentions(unet):
    sites = ADAPTER.attention_sites(unet)
    assert {unet.get_submodule(site) for site in sites} == {
        module for module in unet.modules() if isinstance(module, Attention)
    }


def test_each_attention_folds_its_norm_and_its_values_and_no_consumer_twice(unet):
    folds = ADAPTER.folds(unet)
    consumers = [consumer for _, group in folds for consumer in group]
    attentions = [unet.get_submodule(site) for site in ADAPTER.attention_sites(unet)]
    with_norm = [attention for attention in attentions if attention.group_norm is not None]
    assert len(folds) == len(attentions) + len(with_norm)
    assert len(set(consumers)) == len(consumers)
    assert set(consumers) <= layers(unet)
    assert all(unet.get_submodule(producer).weight is not None for producer, _ in folds)


def scaled(model, producer, consumers, seed=0):
    """A copy with random factors moved from the producer's output into its consumers."""
    model = copy.deepcopy(model)
    channels = model.get_submodule(consumers[0]).weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(channels, generator=generator).exp()
    for consumer in consumers:
        weight = model.get_submodule(consumer).weight.data
        weight.mul_(factors.view(1, -1, *(1,) * (weight.dim() - 2)))
    fold_into_producer(model.get_submodule(producer), factors)
    return model


def test_each_fold_leaves_the_output_unchanged(unet):
    expected = forward(unet)
    for seed, (producer, consumers) in enumerate(ADAPTER.folds(unet)):
        found = forward(scaled(unet, producer, consumers, seed))
        difference = (found - expected).abs().max() / expected.abs().max()
        assert difference <= 1e-5, (producer, float(difference))


def test_all_folds_together_leave_the_output_unchanged(unet):
    expected, model = forward(unet), unet
    for seed, (producer, consumers) in enumerate(ADAPTER.folds(unet)):
        model = scaled(model, producer, consumers, seed)
    assert (forward(model) - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("producer", "consumers"),
    [
        ("down_blocks.0.resnets.0.norm1", ("down_blocks.0.resnets.0.conv1",)),
        ("conv_norm_out", ("conv_out",)),
        ("time_embedding.linear_1", ("time_embedding.linear_2",)),
        ("mid_block.attentions.0.group_norm", ("mid_block.attentions.0.to_q",)),
        ("mid_block.resnets.0.conv2", ("mid_block.attentions.0.to_out.0",)),
    ],
    ids=["through SiLU", "into the output", "time embedding", "q alone", "not the producer"],
)
def test_what_is_not_on_the_list_does_not_fold(tiny_unet, producer, consumers):
    unet = tiny_unet()
    assert (producer, consumers) not in ADAPTER.folds(unet)
    expected = forward(unet)
    found = forward(scaled(unet, producer, consumers))
    assert (found - expected).abs().max() > 1e-3 * expected.abs().max()


def test_the_adapter_is_found_by_the_class_of_the_model(tiny_unet):
    assert isinstance(adapter_for(tiny_unet()), UNet2DAdapter)


def test_an_unknown_architecture_is_named():
    told = r"no adapter for the architecture Linear: expected one of .*UNet2DModel"
    with pytest.raises(StepQuantError, match=told):
        adapter_for(nn.Linear(2, 2))
