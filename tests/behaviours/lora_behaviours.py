"""LoRAs through the calls of diffusers and peft, against the float model with the same LoRA."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from behaviour import behaviour, need
from behaviour_subjects import FLOAT, Subject, own_error
from lora_files import RANK, matrices

GROUP = "LoRA"


def layers(s: Subject, conv: bool = False) -> list[str]:
    """Names of some linear layers of attention, or of some 3x3 convolutions."""
    if conv:
        names = [
            name
            for name, layer in s.float_model.named_modules()
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and "resnets" in name
        ]
        need(names, "the class has no 3x3 convolutions in blocks")
        return names[:4]
    return [
        name
        for name, layer in s.float_model.named_modules()
        if isinstance(layer, nn.Linear) and name.endswith(("to_q", "to_v", "to_out.0"))
    ]


def lora(s: Subject, seed: int = 0, conv: bool = False) -> dict[str, Tensor]:
    """Random matrices of a strong LoRA; another one for another seed."""
    need(hasattr(s.float_model, "load_lora_adapter"), "the class takes no LoRA")
    # Strong enough to be seen, and weak enough for ranges that were set without it.
    tensors = matrices(s.float_model, layers(s, conv), 3.0 if s.name == "flux" else 1.0)
    return {key: each.roll(seed, 0) for key, each in tensors.items()}


def put(model: Any, tensors: dict[str, Tensor], name: str = "a", **more: Any) -> None:
    model.load_lora_adapter(dict(tensors), prefix=None, adapter_name=name, **more)


def check_change(s: Subject, plain: Tensor, plain_float: Tensor) -> None:
    """What LoRAs changed in the prediction is what they changed in the float model's."""
    found, wanted = s.predict() - plain, s.predict(s.float_model) - plain_float
    assert float(wanted.norm()) > 0.1 * float(plain_float.norm()), "the LoRA is too weak to see"
    assert bool(torch.isfinite(found).all()) and float(found.norm()) > 0, "NaN, or no change"
    if s.kind != FLOAT and own_error(s.kind, s.name) > 0.7:
        return  # random UNets at four bits: so far off that no direction is left to compare
    cosine = float(torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0))
    # Ranges were set without the LoRA, and clip what it adds; tests/lora compares exactly.
    least = {"W4A4": 0.3, "w4": 0.7, "W8A8": 0.4}.get(s.kind, 0.95)
    assert cosine > least, (
        f"the change's cosine to the float model's is {cosine:.2f}: at least {least}"
    )


def both(s: Subject) -> tuple[Any, Any]:
    return s.model, s.float_model


def check_loaded_and_unloaded(s: Subject, tensors: dict[str, Tensor]) -> None:
    plain, plain_float = s.predict(), s.predict(s.float_model)
    for model in both(s):
        put(model, tensors)
    check_change(s, plain, plain_float)
    s.model.unload_lora()
    s.same(s.predict(), plain)


@behaviour(GROUP)
def lora_loaded_and_unloaded(s: Subject) -> None:
    """`load_lora_adapter` changes the numbers as in the float model, `unload_lora` changes back."""
    check_loaded_and_unloaded(s, lora(s))


@behaviour(GROUP)
def lora_scaled(s: Subject) -> None:
    """`set_adapters` with a weight scales a LoRA, and takes it away with weight 0."""
    plain, plain_float, tensors = s.predict(), s.predict(s.float_model), lora(s)
    for model in both(s):
        put(model, tensors)
        model.set_adapters(["a"], [0.6])
    check_change(s, plain, plain_float)
    s.model.set_adapters(["a"], [0.0])
    s.close(s.predict(), plain, 1e-2)


@behaviour(GROUP)
def two_loras(s: Subject) -> None:
    """Two LoRAs with weights; one of them deleted with `delete_adapters`."""
    plain, plain_float = s.predict(), s.predict(s.float_model)
    first, second = lora(s), lora(s, 1)
    for model in both(s):
        put(model, first, "a")
        put(model, second, "b")
        model.set_adapters(["a", "b"], [0.5, 1.0])
    check_change(s, plain, plain_float)
    for model in both(s):
        model.delete_adapters("a")
    check_change(s, plain, plain_float)


@behaviour(GROUP)
def lora_disabled(s: Subject) -> None:
    """`disable_lora` and `enable_lora` take it away and bring it back."""
    plain, tensors = s.predict(), lora(s)
    put(s.model, tensors)
    wanted = s.predict()
    s.model.disable_lora()
    s.close(s.predict(), plain, 1e-2)
    s.model.enable_lora()
    s.same(s.predict(), wanted)


@behaviour(GROUP)
def lora_swapped(s: Subject) -> None:
    """`load_lora_adapter(hotswap=True)` puts another LoRA in the place of the first."""
    plain, plain_float = s.predict(), s.predict(s.float_model)
    first, second = lora(s), lora(s, 1)
    put(s.model, first)
    s.predict()
    put(s.model, second, hotswap=True)
    put(s.float_model, second)  # by another way, as the control
    check_change(s, plain, plain_float)


@behaviour(GROUP)
def lora_on_convolutions(s: Subject) -> None:
    """A LoRA of 3x3 convolutions changes the numbers as in the float model."""
    check_loaded_and_unloaded(s, lora(s, conv=True))


@behaviour(GROUP)
def dora(s: Subject) -> None:
    """DoRA, which scales the columns of the weight, changes the numbers as in the float model."""
    plain, plain_float, tensors = s.predict(), s.predict(s.float_model), lora(s)
    for name in layers(s):
        norm = s.float_model.get_submodule(name).weight.detach().norm(dim=1)
        tensors[f"{name}.lora_magnitude_vector"] = 1.5 * norm
    for model in both(s):
        put(model, tensors)
    check_change(s, plain, plain_float)


@behaviour(GROUP)
def lora_fused(s: Subject) -> None:
    """`fuse_lora` and `unfuse_lora` change the numbers as in the float model."""
    plain, plain_float, tensors = s.predict(), s.predict(s.float_model), lora(s)
    for model in both(s):
        put(model, tensors)
        model.fuse_lora()
    check_change(s, plain, plain_float)
    s.model.unfuse_lora()
    s.model.unload_lora()
    s.as_float(s.predict(), plain_float)


@behaviour(GROUP)
def lora_trained(s: Subject) -> None:
    """`add_adapter`, then a backward pass: the matrices' gradients are nearly the float model's."""
    need(hasattr(s.float_model, "add_adapter"), "the class takes no LoRA")
    from peft import LoraConfig

    found, names = [], layers(s)
    for model in both(s):
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=RANK, target_modules=names))
        for key, matrix in model.named_parameters():
            if matrix.requires_grad:  # by name, because the order of modules may differ
                seed = torch.Generator().manual_seed(crc32(key.encode()))
                matrix.data = torch.randn(matrix.shape, generator=seed) / 4
        y = model(**s.inputs, return_dict=False)[0]
        of = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
        (y * of).sum().backward()
        trained = {k: v.grad for k, v in model.named_parameters() if v.requires_grad}
        assert trained and all(each is not None for each in trained.values()), "no gradient"
        found.append(torch.cat([trained[key].flatten() for key in sorted(trained)]))
    cosine = float(torch.cosine_similarity(*found, dim=0))
    least = {"W4A4": 0.2, "w4": 0.7, "W8A8": 0.6}.get(s.kind, 0.95)
    assert cosine > least, f"the gradients' cosine is {cosine:.2f}: expected more than {least}"


@behaviour(GROUP)
def lora_saved(s: Subject) -> None:
    """`save_lora_adapter` writes a file that a float model takes."""
    tensors = lora(s)
    put(s.model, tensors)
    s.model.save_lora_adapter(s.folder, adapter_name="a")
    put(s.float_model, tensors)
    wanted = s.predict(s.float_model)
    s.float_model.unload_lora()
    s.float_model.load_lora_adapter(
        str(s.folder),
        prefix=None,
        adapter_name="b",
        weight_name="pytorch_lora_weights.safetensors",
    )
    s.close(s.predict(s.float_model), wanted)


@behaviour(GROUP)
def lora_of_the_pipeline(s: Subject) -> None:
    """`load_lora_weights` from a file, `set_adapters` and `unload_lora_weights` of the pipeline."""
    need(s.name in ("sd", "sdxl", "sd3", "flux"), "the pipeline takes no LoRA")
    plain, plain_float, tensors = s.predict(), s.predict(s.float_model), lora(s)
    save_file(
        {f"{s.component}.{key}": each for key, each in tensors.items()},
        s.folder / "pytorch_lora_weights.safetensors",
    )
    pipelines = [s.pipeline(model) for model in both(s)]
    for pipeline in pipelines:
        pipeline.load_lora_weights(str(s.folder), adapter_name="a")
        pipeline.set_adapters(["a"], [0.8])
    check_change(s, plain, plain_float)
    pipelines[0].unload_lora_weights()
    s.same(s.predict(), plain)


@behaviour(GROUP, control=False)
def lora_then_saved(s: Subject) -> None:
    """`save_pretrained` with a LoRA on the model: what is written loads as the model without it."""
    plain = s.predict()
    put(s.model, lora(s))
    s.model.save_pretrained(s.folder)
    s.same(s.predict(type(s.model).from_pretrained(s.folder).eval()), plain)
