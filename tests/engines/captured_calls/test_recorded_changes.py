"""What was changed at a denoiser after its calls were recorded."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from fast_models import TABLES, packed
from recorded_models import assert_alike, scale_a_norm
from stepquant.engines.backend import set_backend
from stepquant.engines.captured_calls import RecordedDenoiser
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.resident import set_memory_mode
from stepquant.runtime.ops import native

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(native.why_no_products() is not None, reason=str(native.why_no_products())),
]


def add_lora(model: nn.Module) -> None:
    class Branch(nn.Module):
        def add_to(self, y: Tensor, x: Tensor) -> Tensor:
            return y + 1

    next(m for m in model.modules() if isinstance(m, IntegerLayer)).lora = Branch()


def replace_a_norm(model: nn.Module) -> None:
    norm = next(m for m in model.modules() if isinstance(m, nn.GroupNorm))
    norm.weight = nn.Parameter(norm.weight.detach() * 1.5)


def share_memory(model: nn.Module) -> None:
    model.share_memory()


def other_kernels(model: nn.Module) -> None:
    set_backend(model, "reference")


def low_memory(model: nn.Module) -> None:
    set_memory_mode(model, "low")


def hook(model: nn.Module) -> None:
    model.conv_in.register_forward_hook(lambda module, args, output: output * 1.5)


def train(model: nn.Module) -> None:
    model.train()


def load_other_weights(model: nn.Module) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["conv_in.bias"] += 1
    model.load_state_dict(state)


def half(model: nn.Module) -> None:
    for part in model.children():
        part.to(torch.bfloat16).to(torch.float32)


def patch(model: nn.Module) -> None:
    forward = model.conv_in.forward
    model.conv_in.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.5


def hook_of_accelerate(model: nn.Module) -> None:
    class Louder(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 1.5

    add_hook_to_module(model.conv_in, Louder())


def free_u(model: nn.Module) -> None:
    model.enable_freeu(s1=0.5, s2=0.5, b1=1.5, b2=1.5)


def other_processor(model: nn.Module) -> None:
    class Halved(AttnProcessor2_0):
        def __call__(self, *args: object, **kwargs: object) -> Tensor:
            return super().__call__(*args, **kwargs) / 2

    model.set_attn_processor(Halved())


def another_eps(model: nn.Module) -> None:
    next(m for m in model.modules() if isinstance(m, nn.GroupNorm)).eps = 0.1


def scale_a_residual(model: nn.Module) -> None:
    model.down_blocks[0].resnets[0].output_scale_factor = 2.0


def processor_in_place(model: nn.Module) -> None:
    for processor in model.attn_processors.values():
        processor.scale = 0.5


def another_activation(model: nn.Module) -> None:
    model.mid_block.resnets[0].nonlinearity = nn.Tanh()


def chunked_feed_forward(model: nn.Module) -> None:
    block = next(m for m in model.modules() if isinstance(m, BasicTransformerBlock))
    block.set_chunk_feed_forward(1, dim=0)


CHANGES = [
    *(patch, hook_of_accelerate, free_u, other_processor, another_eps, scale_a_residual),
    *(processor_in_place, chunked_feed_forward, another_activation),
    *(add_lora, scale_a_norm, replace_a_norm, share_memory, other_kernels, low_memory, hook),
    *(train, load_other_weights, half),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
def test_changes_of_the_denoiser_are_seen(change):
    plain = packed("sd", TABLES)
    model = RecordedDenoiser(copy.deepcopy(plain))
    assert_alike(model, plain)
    assert model.recordings == 1
    for each in (plain, model.denoiser):
        change(each)
    assert_alike(model, plain, calls=1)
    assert model.recordings == 0  # it was dropped, whatever the numbers are now
    assert_alike(model, plain)


def test_what_stood_in_the_way_may_go_again():
    plain = packed("sd")
    model = RecordedDenoiser(plain)
    handle = plain.conv_in.register_forward_hook(lambda module, args, output: output * 1.5)
    assert_alike(model, plain)
    assert model.reasons == ["a hook"]
    handle.remove()
    assert_alike(model, plain)
    assert (model.recordings, model.reasons) == (1, [])


def test_one_hook_in_the_place_of_another_is_seen():
    plain = packed("sd")
    model = RecordedDenoiser(plain)
    assert_alike(model, plain)
    (key, _), *_ = plain._forward_pre_hooks.items()
    hook = plain._forward_pre_hooks[key]
    plain._forward_pre_hooks[key] = lambda *args: hook(*args)
    assert_alike(model, plain, calls=1)
    assert model.recordings == 0


@pytest.mark.parametrize("backend", ["onednn", "native", "reference", "int_mm"])
def test_every_backend(backend):
    plain = packed("sd", TABLES)
    set_backend(plain, backend)
    model = RecordedDenoiser(plain)
    assert_alike(model, plain)
    assert model.recordings + len(model.reasons) == 1


def test_another_number_of_threads_is_seen():
    plain = packed("sd")
    model = RecordedDenoiser(plain)
    assert_alike(model, plain)
    torch.set_num_threads(2)
    assert_alike(model, plain, calls=1)
    assert model.recordings == 0
    assert_alike(model, plain)
    assert model.recordings == 1
