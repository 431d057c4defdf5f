"""Saving, loading, copying, and what a model says of itself."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from behaviour import behaviour
from behaviour_subjects import FLOAT, Subject

GROUP = "Save and load"


def check_loaded(s: Subject, **more: Any) -> Any:
    """The folder of `s` loads to a model of the same bits, which is returned."""
    loaded = type(s.model).from_pretrained(s.folder, **s.named_dtype, **more).eval()
    s.same(s.predict(loaded), s.predict())
    return loaded


def in_bfloat16(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs as pipelines hand them over: all but timesteps and guidance in the dtype."""
    return tree_map_only(
        torch.Tensor,
        lambda each: each.bfloat16() if each.dim() > 1 and each.is_floating_point() else each,
        inputs,
    )


@behaviour(GROUP)
def save_and_load(s: Subject) -> None:
    """`save_pretrained` and `from_pretrained`: the same bits."""
    s.model.save_pretrained(s.folder)
    loaded = check_loaded(s)
    found, wanted = loaded.state_dict(), s.model.state_dict()
    assert found.keys() == wanted.keys(), "the state dicts have other names"


@behaviour(GROUP)
def shards(s: Subject) -> None:
    """`save_pretrained(max_shard_size=...)`: several files load to the same bits."""
    s.model.save_pretrained(s.folder, max_shard_size="8KB")
    assert list(s.folder.glob("*.index.json")), "there is one file only"
    check_loaded(s)


@behaviour(GROUP)
def variant(s: Subject) -> None:
    """`variant="fp16"` in `save_pretrained` and `from_pretrained`: the same bits."""
    s.model.save_pretrained(s.folder, variant="fp16")
    assert list(s.folder.glob("*.fp16.*")), "no file has the variant in its name"
    check_loaded(s, variant="fp16")


@behaviour(GROUP)
def torch_dtype(s: Subject) -> None:
    """`from_pretrained(torch_dtype=torch.bfloat16)` computes in it, near to float32."""
    model = s.again(torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16, f"dtype is {model.dtype}"
    found = s.predict(model, **in_bfloat16(s.inputs))
    assert found.dtype == torch.bfloat16, f"the prediction is {found.dtype}"
    s.as_float(found, s.predict(s.float_model), 0.1)


@behaviour(GROUP)
def device_map(s: Subject) -> None:
    """`from_pretrained(device_map={"": "cpu"})`: the same bits."""
    s.same(s.predict(s.again(device_map={"": "cpu"})), s.predict())


@behaviour(GROUP)
def device_map_with_a_disk(s: Subject) -> None:
    """`device_map` with a block on "disk" and an `offload_folder`: the same bits."""
    wanted = s.predict()
    names = [name for name, _ in s.model.named_children()]
    places = {name: "cpu" for name in names}
    block = next(name for name in names if name.endswith("blocks"))
    places[block] = "disk"
    s.model.save_pretrained(s.folder / "model")
    loaded = type(s.model).from_pretrained(
        s.folder / "model", device_map=places, offload_folder=str(s.folder / "disk")
    )
    s.same(s.predict(loaded.eval()), wanted)


@behaviour(GROUP)
def changed_config(s: Subject) -> None:
    """`register_to_config` of a loaded model, then `save_pretrained`: the folder loads."""
    change = {"out_channels": 16} if s.name == "flux" else {"sample_size": 9}
    s.model.register_to_config(**change)
    s.model.save_pretrained(s.folder)
    loaded = check_loaded(s)
    key, value = next(iter(change.items()))
    assert loaded.config[key] == value, f"'{key}' is {loaded.config[key]}"


@behaviour(GROUP)
def state_dict(s: Subject) -> None:
    """`load_state_dict` of a model's own `state_dict` undoes changes of its tensors."""
    wanted = s.predict()
    kept = {key: value.clone() for key, value in s.model.state_dict().items()}
    with torch.no_grad():
        for key, value in s.model.state_dict().items():
            if key.endswith(".bias") and value.is_floating_point():
                value.add_(1.0)
    assert not torch.equal(s.predict(), wanted), "changed biases change nothing"
    s.model.load_state_dict(kept)
    s.same(s.predict(), wanted)


@behaviour(GROUP)
def deepcopy(s: Subject) -> None:
    """`copy.deepcopy` gives the same bits, and a model of its own."""
    wanted = s.predict()
    copied = copy.deepcopy(s.model)
    s.same(s.predict(copied), wanted)
    copied.save_pretrained(s.folder)
    check_loaded(s)
    with torch.no_grad():
        for key, value in copied.state_dict().items():
            if key.endswith(".bias"):
                value.zero_()
    assert not torch.equal(s.predict(copied), wanted), "the copy does not change"
    s.same(s.predict(), wanted)


@behaviour(GROUP)
def pickled(s: Subject) -> None:
    """`pickle` and `torch.save` of the whole model: the same bits."""
    wanted = s.predict()
    s.same(s.predict(pickle.loads(pickle.dumps(s.model))), wanted)
    file = io.BytesIO()
    torch.save(s.model, file)
    file.seek(0)
    s.same(s.predict(torch.load(file, weights_only=False)), wanted)


@behaviour(GROUP)
def first_parameter(s: Subject) -> None:
    """`next(model.parameters()).dtype` and `model.dtype` are the dtype of activations."""
    assert next(s.model.parameters()).dtype == torch.float32
    assert s.model.dtype == torch.float32
    half = s.again(torch_dtype=torch.float16)
    assert next(half.parameters()).dtype == half.dtype == torch.float16


@behaviour(GROUP)
def num_parameters(s: Subject) -> None:
    """`num_parameters()` is the float model's."""
    found, wanted = s.model.num_parameters(), s.float_model.num_parameters()
    assert found == wanted, f"{found} parameters: expected {wanted}"


@behaviour(GROUP)
def memory_footprint(s: Subject) -> None:
    """`get_memory_footprint()` is less than the float model's."""
    found, whole = s.model.get_memory_footprint(), s.float_model.get_memory_footprint()
    assert found > 0 and (found < whole or s.kind == FLOAT), f"{found} of {whole} bytes"


@behaviour(GROUP)
def to_its_own_dtype(s: Subject) -> None:
    """`.to(dtype)` with the dtype that the model has changes nothing."""
    wanted = s.predict()
    s.same(s.predict(s.model.to(torch.float32)), wanted)


@behaviour(GROUP)
def to_another_dtype(s: Subject) -> None:
    """`.to(torch.bfloat16)` gives a model that computes in it."""
    wanted = s.predict(s.float_model)
    model = s.model.to(torch.bfloat16)
    s.as_float(s.predict(model, **in_bfloat16(s.inputs)), wanted, 0.1)


@behaviour(GROUP)
def to_a_device(s: Subject) -> None:
    """`.to("cpu")` changes nothing."""
    wanted = s.predict()
    s.same(s.predict(s.model.to("cpu")), wanted)


@behaviour(GROUP)
def dequantize(s: Subject) -> None:
    """`dequantize()` gives a float model that saves, loads, and computes nearly the same."""
    model = s.float_model if s.kind == FLOAT else s.model.dequantize()
    s.as_float(s.predict(model), s.predict(s.float_model))
    model.save_pretrained(s.folder)
    loaded = type(model).from_pretrained(s.folder, **s.named_dtype).eval()
    assert loaded.num_parameters() == s.float_model.num_parameters()
    s.same(s.predict(loaded), s.predict(model))
