"""Calls of the denoiser: gradients, compilation, attention, threads, sizes, hooks."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from behaviour import TRANSFORMERS, behaviour, need
from behaviour_subjects import Subject

GROUP = "Calls"
COMPILED = ("pixart", "flux")


def gradient(s: Subject, model: nn.Module) -> Tensor:
    """Of the prediction's product with random numbers, by the sample."""
    x = s.inputs[s.sample_name].clone().requires_grad_()
    y = model(**{**s.inputs, s.sample_name: x}, return_dict=False)[0]
    of = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    (y * of).sum().backward()
    assert x.grad is not None, "the sample has no gradient"
    return x.grad


def alike(found: Tensor, wanted: Tensor, limit: float) -> None:
    cosine = float(torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0))
    assert cosine > limit, f"the gradients' cosine is {cosine:.2f}: expected more than {limit}"


LEAST = {"W4A4": 0.3, "w4": 0.8, "W8A8": 0.9}


@behaviour(GROUP)
def gradient_of_the_input(s: Subject) -> None:
    """The gradient by the sample points where the float model's does."""
    s.model.requires_grad_(False)
    alike(gradient(s, s.model), gradient(s, s.float_model), LEAST.get(s.kind, 0.95))


@behaviour(GROUP)
def gradient_checkpointing(s: Subject) -> None:
    """`enable_gradient_checkpointing` gives the gradient that it gives without."""
    need(s.float_model._supports_gradient_checkpointing, "the class has none")
    need(s.name != "dit", "training drops labels at random")
    wanted = gradient(s, s.model)
    s.model.enable_gradient_checkpointing()
    s.model.train()
    s.close(gradient(s, s.model), wanted, 1e-3)


@behaviour(GROUP, slow=True)
def compiled(s: Subject) -> None:
    """`torch.compile(fullgraph=True)` gives the eager numbers, in `aot_eager`."""
    need(s.name in COMPILED, "tried on the quickest to compile")
    wanted = s.predict()
    torch._dynamo.reset()
    found = s.predict(torch.compile(s.model, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    s.close(found, wanted, 1e-3)


@behaviour(GROUP, slow=True)
def compiled_blocks(s: Subject) -> None:
    """`compile_repeated_blocks(fullgraph=True)` gives the eager numbers."""
    need(s.name in COMPILED, "tried on the quickest to compile")
    need(getattr(s.float_model, "_repeated_blocks", None), "the class names no repeated blocks")
    wanted = s.predict()
    torch._dynamo.reset()
    s.model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    found = s.predict()
    torch._dynamo.reset()
    s.close(found, wanted, 1e-3)


@behaviour(GROUP)
def attention_processors(s: Subject) -> None:
    """`set_attn_processor` with a processor of diffusers: the same numbers."""
    need(hasattr(s.float_model, "set_attn_processor"), "the class has no set_attn_processor")
    need(s.name != "flux", "Flux has one processor only")
    wanted = s.predict()
    s.model.set_attn_processor(JointAttnProcessor2_0() if s.name == "sd3" else AttnProcessor())
    s.close(s.predict(), wanted, 1e-3)
    if s.name != "sd3":
        s.model.set_attn_processor(AttnProcessor2_0())
        s.close(s.predict(), wanted, 1e-3)


@behaviour(GROUP)
def own_attention_processor(s: Subject) -> None:
    """A processor of the user's is called, and changes the numbers as in the float model."""
    need(s.name in ("sd", "sdxl"), "tried on conditional UNets")

    class Louder(AttnProcessor2_0):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return 3 * super().__call__(*args, **kwargs)

    plain = s.predict()
    s.float_model.set_attn_processor(Louder())
    s.model.set_attn_processor(Louder())
    assert not torch.equal(s.predict(), plain), "the processor was not called"
    s.as_float(s.predict(), s.predict(s.float_model))


@behaviour(GROUP)
def fused_projections(s: Subject) -> None:
    """`fuse_qkv_projections`, and back with `unfuse_qkv_projections`: the same numbers."""
    need(hasattr(s.float_model, "fuse_qkv_projections"), "the class has no fuse_qkv_projections")
    need(s.name != "sd3", "diffusers cannot fuse the last block, which has no context")
    wanted = s.predict()
    s.model.fuse_qkv_projections()
    s.close(s.predict(), wanted, 1e-3)
    s.model.unfuse_qkv_projections()
    s.close(s.predict(), wanted, 1e-3)


@behaviour(GROUP)
def attention_backend(s: Subject) -> None:
    """`set_attention_backend("native")`: the same numbers."""
    wanted = s.predict()
    s.model.set_attention_backend("native")
    s.close(s.predict(), wanted, 1e-3)


@behaviour(GROUP)
def free_u(s: Subject) -> None:
    """`enable_freeu` changes the numbers as in the float model."""
    need(hasattr(s.float_model, "enable_freeu"), "the class has no FreeU")
    for model in (s.model, s.float_model):
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    s.as_float(s.predict(), s.predict(s.float_model))


def of_one(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """The arguments of one of two samples."""
    return tree_map_only(
        Tensor, lambda each: each[row : row + 1] if each.dim() and len(each) == 2 else each, inputs
    )


@behaviour(GROUP)
def other_batch(s: Subject) -> None:
    """A sample's prediction does not depend on the batch."""
    both = s.predict()
    for row in range(2):
        s.close(s.predict(**of_one(s.inputs, row)), both[row : row + 1], 1e-2)


@behaviour(GROUP)
def other_size(s: Subject) -> None:
    """A sample of another size is predicted as the float model does."""
    need(s.name not in ("dit", "pixart"), "the transformer's positions are of one size")
    generator = torch.Generator().manual_seed(3)
    x = s.inputs[s.sample_name]
    shape = (2, 8, x.shape[-1]) if x.dim() == 3 else (2, x.shape[1], 12, 16)
    changes: dict[str, Any] = {s.sample_name: torch.randn(shape, generator=generator)}
    if s.name == "flux":
        changes["img_ids"] = s.inputs["img_ids"][:8]
    s.as_float(s.predict(**changes), s.predict(s.float_model, **changes))
    s.predict()  # and back


@behaviour(GROUP)
def two_threads(s: Subject) -> None:
    """Two threads that call one model with different inputs: the bits of calls in turn."""
    name = s.sample_name
    samples = [s.inputs[name] * size for size in (1.0, 0.5)]
    wanted = [s.predict(**{name: x}) for x in samples]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda x: [s.predict(**{name: x}) for _ in range(3)], samples))
    for each, right in zip(found, wanted, strict=True):
        for y in each:
            s.same(y, right)


@behaviour(GROUP)
def hooks_on_layers(s: Subject) -> None:
    """A forward hook on a linear layer sees its output, and may change it."""
    layer = "transformer_blocks.0.ff.net.2" if s.name in TRANSFORMERS else "time_embedding.linear_2"
    seen: list[Tensor] = []

    def double(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        seen.append(y)
        return 2 * y

    handles = [
        model.get_submodule(layer).register_forward_hook(double)
        for model in (s.model, s.float_model)
    ]
    found, wanted = s.predict(), s.predict(s.float_model)
    assert len(seen) == 2, f"{len(seen)} of 2 hooks were called"
    s.as_float(*seen, 0.1)
    s.as_float(found, wanted, 0.1)
    for handle in handles:
        handle.remove()
    s.same(s.predict(), s.predict(s.again()))


@behaviour(GROUP)
def answer_as_an_object(s: Subject) -> None:
    """`model(...).sample` is the first entry of `return_dict=False`."""
    with torch.no_grad():
        s.same(s.model(**s.inputs).sample, s.predict())


@behaviour(GROUP)
def train_and_eval(s: Subject) -> None:
    """`train()`, `eval()` and `requires_grad_(False)` change no numbers."""
    wanted = s.predict()
    s.same(s.predict(copy.copy(s.model).train().eval().requires_grad_(False)), wanted)
