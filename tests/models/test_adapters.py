"""What holds for the adapter of every architecture; `test_unet2d.py` has more on the first."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, build, session
from quantize_runs import refused
from stepquant.calibration.block_inputs import capture_outputs, execution_order
from stepquant.calibration.block_replay import replayable_blocks
from stepquant.calibration.trajectories import predict
from stepquant.methods.block_distillation import BlockDistillation
from stepquant.methods.channel_reparameterization import ChannelReparameterization
from stepquant.methods.relation_distillation import RelationDistillation
from stepquant.methods.smoothing import Smoothing
from stepquant.methods.weight_dilation import WeightDilation
from stepquant.models.adapter import ADAPTERS, adapter_for, register_adapter
from stepquant.models.base import DiffusersAdapter
from stepquant.models.calling import call_denoiser
from stepquant.models.modulation import fold_into_modulation
from stepquant.support.errors import StepQuantError
from stepquant.verbs.bench import denoiser_call

SCALINGS = pytest.mark.parametrize(
    "step",
    [WeightDilation(), Smoothing(), ChannelReparameterization(layers="all")],
    ids=lambda step: step.name,
)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return getattr(build(name), ARCHITECTURES[name].component)


@pytest.fixture(scope="module")
def adapter(model):
    return adapter_for(model)


@pytest.fixture(scope="module")
def inputs(name):
    return session(name).trajectories


def layers(model):
    return {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }


def test_every_layer_is_in_exactly_one_block(model, adapter):
    blocks = adapter.blocks(model)
    for layer in layers(model):
        holders = [block for block in blocks if layer == block or layer.startswith(f"{block}.")]
        assert len(holders) == 1, (layer, holders)


def test_blocks_and_folds_are_as_many_as_the_architecture_has(name, model, adapter):
    wanted = ARCHITECTURES[name]
    if wanted.blocks is not None:
        assert len(adapter.blocks(model)) == wanted.blocks
        assert len(adapter.folds(model)) == wanted.folds


def test_outer_layers_see_the_sample_and_give_the_result(model, adapter):
    """Of all layers called in a forward, the first that reads the sample, and the last."""
    called = []
    handles = [
        model.get_submodule(layer).register_forward_pre_hook(
            lambda _m, _a, layer=layer: called.append(layer)
        )
        for layer in layers(model)
    ]
    sample, timestep, conditions = adapter.random_inputs(model, 1)
    with torch.no_grad():
        call_denoiser(model, sample, timestep, conditions)
    for handle in handles:
        handle.remove()
    outer = adapter.input_output_layers(model)
    assert len(outer) == 2 and outer < layers(model)
    assert called[-1] in outer
    (first,) = outer - {called[-1]}
    channels = sample.shape[1] if sample.dim() == 4 else sample.shape[2]
    assert model.get_submodule(first).weight.shape[1] == channels


def test_time_embeddings_are_called_with_a_row_for_each_timestep(model, adapter):
    found = adapter.time_embedding_layers(model)
    assert found and all("time" in name or "guidance" in name or "add_" in name for name in found)
    assert found < layers(model)


@torch.no_grad()
def test_every_fold_leaves_the_prediction_alone(model, adapter, inputs):
    expected = predict(model, inputs)
    for producer, consumers in adapter.folds(model):
        changed = copy.deepcopy(model)
        channels = changed.get_submodule(consumers[0]).weight.shape[1]
        factors = torch.rand(channels, generator=torch.Generator().manual_seed(0)) * 3 + 0.2
        source = changed.get_submodule(producer)
        for part in (source.weight, source.bias):
            if part is not None:
                part[:channels].div_(factors.view(-1, *(1,) * (part.dim() - 1)))
        for consumer in consumers:
            weight = changed.get_submodule(consumer).weight
            weight.mul_(factors.view(1, -1, *(1,) * (weight.dim() - 2)))
        found = predict(changed, inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=producer)


@torch.no_grad()
def test_every_modulation_leaves_the_prediction_alone(model, adapter, inputs):
    """By what the norm's consumers read: a random factor for each channel, taken back by them."""
    expected = predict(model, inputs)
    for entry in adapter.modulations(model):
        changed = copy.deepcopy(model)
        channels = changed.get_submodule(entry.consumers[0]).weight.shape[1]
        factors = torch.rand(channels, generator=torch.Generator().manual_seed(0)) * 3 + 0.2
        seen = {}
        for when, one in (("before", model), ("after", changed)):
            handle = one.get_submodule(entry.consumers[-1]).register_forward_pre_hook(
                lambda _m, args, when=when, seen=seen: seen.update({when: args[0]})
            )
            if when == "after":
                linear = changed.get_submodule(entry.linear)
                fold_into_modulation(linear, entry.shift, entry.scale, factors)
                for consumer in entry.consumers:
                    changed.get_submodule(consumer).weight.mul_(factors)
            found = predict(one, inputs)
            handle.remove()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=str(entry))
        torch.testing.assert_close(seen["after"] * factors, seen["before"], rtol=1e-4, atol=1e-4)


def test_modulations_are_as_many_as_the_architecture_has(name, model, adapter):
    found = adapter.modulations(model)
    assert len(found) == ARCHITECTURES[name].modulations
    consumers = [consumer for entry in found for consumer in entry.consumers]
    assert len(consumers) == len(set(consumers))
    folded = [consumer for _, group in adapter.folds(model) for consumer in group]
    assert not set(consumers) & set(folded)


@torch.no_grad()
@SCALINGS
def test_scaled_blocks_give_what_the_float_ones_give(name, step):
    """Or else training them to do so would undo a scaling that another block takes back."""
    changed = session(name)
    blocks = changed.adapter.blocks(changed.float_model)
    step.apply(changed)
    chains = (changed.float_model, changed.model)
    expected, found = (capture_outputs(one, blocks, changed.trajectories, 8) for one in chains)
    for block in blocks:
        torch.testing.assert_close(
            found[block], expected[block], rtol=1e-4, atol=1e-4, msg=lambda m, b=block: f"{b}: {m}"
        )


@torch.no_grad()
@SCALINGS
def test_equivalent_transforms_leave_the_prediction_alone(name, step):
    changed = session(name)
    expected = predict(changed.float_model, changed.trajectories)
    step.apply(changed)
    found = predict(changed.model, changed.trajectories)
    assert not torch.equal(found, expected)  # something was scaled
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_random_inputs_are_what_the_denoiser_takes(model, adapter):
    once, again = adapter.random_inputs(model, 3), adapter.random_inputs(model, 3)
    first, second = (call_denoiser(model, *inputs) for inputs in (once, again))
    assert first.shape[0] == 3
    assert bool(first.isfinite().all())
    assert torch.equal(first, second)
    assert len(denoiser_call(model, 2)()[0]) == 2


def test_random_inputs_have_the_arguments_of_the_sampler(model, adapter, inputs):
    captured = inputs.conditions.arguments()
    _, _, given = adapter.random_inputs(model, 2)
    given.pop("timestep_cond", None)
    unused = {"cross_attention_kwargs", "joint_attention_kwargs"}
    assert given.keys() == captured.keys() - unused
    for key, value in given.items():
        if isinstance(value, torch.Tensor) and key not in ("img_ids", "txt_ids"):
            assert value.shape[2:] == captured[key].shape[2:], key


def test_relations_are_of_pixels_or_tokens(name, model, adapter):
    step = RelationDistillation(rounds=1, batch=1)
    step.check_model(model, adapter, build(name).scheduler)
    trained = session(name)
    step.apply(trained)
    norms = trained.summary["relation_distillation"]["gradient_norms"]
    assert all(row["task"] > 0 and row["term"] > 0 for row in norms)


def test_attention_products_are_quantized_where_the_processor_is_plain(name):
    changed = session(name)
    sites = changed.adapter.attention_sites(changed.float_model)
    quantized = set(changed.attention())
    if name in ("sd", "sdxl", "dit", "pixart"):
        assert quantized == set(sites)
    else:  # joint attention; but the second one of Stable Diffusion 3.5 is plain in kind
        assert quantized == set()
    torch.testing.assert_close(
        predict(changed.model, changed.trajectories),
        predict(changed.float_model, changed.trajectories),
        rtol=1e-4,
        atol=1e-4,
    )


def test_fluxs_single_blocks_join_attention_and_mlp():
    model = build("flux").transformer
    ((name, parts),) = adapter_for(model).skip_splits(model).items()
    block, seen = model.single_transformer_blocks[0], {}
    block.attn.register_forward_hook(lambda _m, _a, y: seen.update(attention=y))
    block.act_mlp.register_forward_hook(lambda _m, _a, y: seen.update(mlp=y))
    model.get_submodule(name).register_forward_pre_hook(lambda _m, a: seen.update(joined=a[0]))
    with torch.no_grad():
        call_denoiser(model, *adapter_for(model).random_inputs(model, 1))
    attention, mlp = seen["joined"].split(parts, dim=-1)
    assert torch.equal(attention, seen["attention"])
    assert torch.equal(mlp, seen["mlp"])


@pytest.mark.parametrize("name", ["sd", "sdxl"], indirect=True)
def test_splits_fall_where_backbone_and_skip_are_joined(model, adapter):
    splits = adapter.skip_splits(model)
    assert len(splits) == 2 * sum(len(block.resnets) for block in model.up_blocks)
    for name, parts in splits.items():
        seen = {}
        resnet = model.get_submodule(name.rpartition(".")[0])
        block = model.get_submodule(name.rpartition(".resnets")[0])

        def enter(_m, _a, kwargs, seen=seen):
            seen.setdefault("skips", kwargs["res_hidden_states_tuple"])

        handles = [
            block.register_forward_pre_hook(enter, with_kwargs=True),
            resnet.register_forward_pre_hook(lambda _m, a, seen=seen: seen.update(joined=a[0])),
        ]
        with torch.no_grad():
            call_denoiser(model, *adapter.random_inputs(model, 1))
        for handle in handles:
            handle.remove()
        skip = seen["joined"].split(parts, dim=1)[1]
        assert any(skip.shape == one.shape and torch.equal(skip, one) for one in seen["skips"])


def test_embeddings_of_other_unets_are_told():
    unet = build("sd").unet
    unet.register_to_config(addition_embed_type="text_image")
    with pytest.raises(StepQuantError, match="embeddings of the kind 'text_image'"):
        adapter_for(unet).random_inputs(unet, 1)


def test_blocks_that_run_once_are_trained_as_if_the_whole_chain_ran(name, monkeypatch, one_thread):
    """Their outputs are replayed: of text and image, and of a block whose parts are used again."""
    step = BlockDistillation(iterations=2, samples=16, batch=4)
    replayed, whole = session(name), session(name)
    order = execution_order(
        replayed.float_model,
        replayed.adapter.blocks(replayed.float_model),
        replayed.trajectories,
    )
    assert set(replayable_blocks(replayed.float_model, order, replayed.trajectories)) == set(order)
    step.apply(replayed)
    monkeypatch.setattr(
        "stepquant.methods.training.block_training.replayable_blocks", lambda *_: {}
    )
    step.apply(whole)
    assert replayed.summary == whole.summary
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, replayed.model.state_dict()[key]), key


class Denoiser(nn.Module):
    """Of an architecture that stepquant does not know."""


class Derived(Denoiser):
    """What derives from it is taken alike."""


def test_an_adapter_from_outside_is_found_by_the_class_of_the_model():
    @register_adapter
    class Mine(DiffusersAdapter):
        architecture = "Denoiser"

    try:
        assert type(adapter_for(Denoiser())) is type(adapter_for(Derived())) is Mine
    finally:
        del ADAPTERS._entries["Denoiser"], ADAPTERS._origins["Denoiser"]


def test_an_architecture_has_one_adapter():
    class Mine(DiffusersAdapter):
        architecture = "UNet2DModel"

    told = refused(lambda: register_adapter(Mine))
    assert "has the name of stepquant.models.unet2d.UNet2DAdapter: expected an unused name" in told
    assert "the architecture of the adapter DiffusersAdapter is None" in refused(
        lambda: register_adapter(DiffusersAdapter)
    )
