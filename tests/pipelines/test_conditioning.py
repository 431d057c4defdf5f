from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stepquant.api import sample
from stepquant.pipelines.conditioning import Conditioning
from stepquant.support.errors import StepQuantError


class Plain:
    def __call__(self, batch_size, generator, output_type):
        """Draws without conditions."""


class Model:
    def __init__(self, **config):
        self.config = config


class OfClasses:
    def __init__(self, classes=7):
        self.transformer = Model(num_embeds_ada_norm=classes)

    def __call__(self, class_labels, guidance_scale=4.0, generator=None):
        """Draws images of classes."""


class OfTexts:
    def __call__(self, prompt, height=None, guidance_scale=7.5, negative_prompt=None):
        """Draws images of texts."""


def test_an_unconditional_pipeline_gets_a_count():
    assert Conditioning().arguments(Plain(), 4, 3) == {"batch_size": 3}


def test_prompts_go_round_by_the_number_of_the_image():
    found = Conditioning.of(prompts=["a", "b", "c"], guidance=2.0, call={"height": 8})
    assert found.arguments(OfTexts(), 4, 3) == {
        "prompt": ["b", "c", "a"],
        "guidance_scale": 2.0,
        "height": 8,
    }


def test_one_prompt_or_label_needs_no_list():
    assert Conditioning.of(prompts="a cat").arguments(OfTexts(), 0, 2)["prompt"] == ["a cat"] * 2
    assert Conditioning.of(labels=3).arguments(OfClasses(), 0, 2)["class_labels"] == [3, 3]


def test_without_labels_all_classes_are_drawn_before_one_comes_again():
    found = Conditioning().arguments(OfClasses(), 0, 14)["class_labels"]
    assert sorted(found[:7]) == list(range(7))
    assert found[:7] == found[7:] != sorted(found[:7])


@pytest.mark.parametrize(
    ("conditioning", "pipeline", "message"),
    [
        ({}, OfTexts(), "OfTexts needs prompts and got none"),
        ({"prompts": "x"}, OfClasses(), "OfClasses takes no prompts"),
        ({"labels": 1}, OfTexts(), "OfTexts takes no class labels"),
        ({"labels": [1, 7]}, OfClasses(), "class label is 7: expected 0 to 6"),
        ({"labels": -1}, OfClasses(), "class label is -1"),
        ({}, OfClasses(None), "does not give the number of classes"),
        ({"guidance": 3.0}, Plain(), "Plain takes no 'guidance_scale'"),
        ({"prompts": "x", "call": {"hight": 8}}, OfTexts(), "OfTexts takes no 'hight'"),
    ],
)
def test_what_a_pipeline_does_not_take_is_told(conditioning, pipeline, message):
    with pytest.raises(StepQuantError, match=message):
        Conditioning.of(**conditioning).check(pipeline)


def test_a_record_tells_prompts_apart_without_holding_them():
    one, other = (Conditioning.of(prompts=[text]).describe() for text in ("a", "b"))
    assert one["prompts"] == other["prompts"] == 1
    assert one["prompts_sha256"] != other["prompts_sha256"]
    assert Conditioning().describe() == {}
    assert Conditioning.of(labels=[2], guidance=1.5).describe() == {"labels": [2], "guidance": 1.5}


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("prompt", "x", "use prompts"),
        ("prompt_embeds", torch.ones(1), "use prompts"),
        ("class_labels", [5], "use labels"),
        ("batch_size", 2, "use num"),
        ("num_images_per_prompt", 2, "use num"),
        ("generator", None, "use seed"),
        ("latents", None, "use seed"),
        ("num_inference_steps", 3, "use steps"),
        ("output_type", "pil", "images come as arrays"),
        ("return_dict", False, "images come as arrays"),
    ],
)
def test_what_is_decided_elsewhere_is_refused_in_the_call(tiny_pipeline, name, value, instead):
    with pytest.raises(
        StepQuantError,
        match=f"the call has the argument '{name}', which .* no such argument.*{instead}",
    ):
        Conditioning.of(call={name: value})
    with pytest.raises(StepQuantError, match=f"the call has the argument '{name}'"):
        sample(tiny_pipeline(), 1, call={name: value})


def test_two_scales_of_guidance_are_refused():
    with pytest.raises(StepQuantError, match=r"is 2\.0 and the call has the guidance_scale"):
        Conditioning.of(guidance=2.0, call={"guidance_scale": 3.0})
    found = Conditioning.of(prompts="a", call={"guidance_scale": 3.0}).arguments(OfTexts(), 0, 1)
    assert found["guidance_scale"] == 3.0


@pytest.mark.parametrize(
    ("negative", "told"), [("fog", ["fog"] * 3), (["x", "y"], ["y", "x", "y"])]
)
def test_a_negative_prompt_is_there_for_each_image(negative, told):
    found = Conditioning.of(prompts=["a", "b"], call={"negative_prompt": negative})
    assert found.arguments(OfTexts(), 1, 3)["negative_prompt"] == told


@pytest.mark.parametrize(
    "labels", [[1, 3], torch.tensor([1, 3]), np.array([1, 3]), range(1, 4, 2), np.int64([1, 3])]
)
def test_labels_may_lie_in_a_tensor_or_an_array(labels):
    conditioning = Conditioning.of(labels=labels)
    assert conditioning.labels == (1, 3)
    assert conditioning.describe() == {"labels": [1, 3]}
    assert Conditioning.of(labels=torch.tensor(0)).labels == (0,)


def test_labels_that_are_no_whole_numbers_are_refused():
    with pytest.raises(StepQuantError, match=r"class label is 1\.5: expected a whole number"):
        Conditioning.of(labels=torch.tensor([1.5]))


CONTENTS = {
    "tensor": lambda at: torch.arange(5000).where(torch.arange(5000) != 2500, at),
    "array": lambda at: np.where(np.arange(5000) == 2500, at, 0),
    "image": lambda at: Image.new("L", (4, 4), at),
    "nested": lambda at: {"scales": [torch.full((3,), float(at))]},
}


@pytest.mark.parametrize("make", CONTENTS.values(), ids=CONTENTS.keys())
def test_a_record_tells_arguments_apart_by_their_contents(make):
    one, same, other = (Conditioning.of(call={"x": make(at)}).describe() for at in (1, 1, 2))
    assert one == same != other
    assert len(str(one)) < 200


def test_a_function_is_recorded_by_its_name_and_an_unknown_thing_refused():
    described = Conditioning.of(call={"x": sample}).describe()["call"]
    assert described == {"x": "stepquant.verbs.sample.sample"}
    with pytest.raises(StepQuantError, match="'x' of the call is a Plain, whose contents a record"):
        Conditioning.of(call={"x": Plain()}).describe()


class Pictures:
    """Takes pictures as diffusers' pipelines do."""

    def __call__(self, prompt=None, image=None, mask_image=None, ip_adapter_image=None):
        pass


A, B, C = (Image.new("RGB", (2, 2), color) for color in ("red", "green", "blue"))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (A, A),  # for all images
        ([A], [A]),
        ([A, B], [A, B]),  # of another meaning than one for each prompt
        ([A, B, C], [B, C, A]),
        ((A, B, C), [B, C, A]),
        ([[A, B, C], A], [[B, C, A], A]),  # of two ControlNets
        ([], []),
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
    ],
    ids=["one", "list of one", "two", "three", "tuple", "nested", "empty", "numbers"],
)
@pytest.mark.parametrize("name", ["image", "mask_image"])
def test_a_list_with_a_picture_for_each_prompt_is_taken_in_turn(name, given, wanted):
    conditioning = Conditioning.of(["a", "b", "c"], call={name: given})
    assert conditioning.arguments(Pictures(), 1, 3)[name] == wanted


def test_a_list_for_ip_adapters_has_one_entry_for_each():
    conditioning = Conditioning.of(["a", "b"], call={"ip_adapter_image": [A, B]})
    assert conditioning.arguments(Pictures(), 1, 1)["ip_adapter_image"] == [A, B]


def test_arrays_and_tensors_are_pictures():
    for several in ([np.zeros(3), np.ones(3)], [torch.zeros(3), torch.ones(3)]):
        conditioning = Conditioning.of(["a", "b"], call={"image": several})
        (found,) = conditioning.arguments(Pictures(), 1, 1)["image"]
        assert found is several[1]


@pytest.mark.parametrize("name", ["controlnet", "adapter"])
def test_a_flat_list_is_one_for_each_of_several_controlnets(name):
    class MultiControlNetModel:
        pass

    pipeline = Pictures()
    setattr(pipeline, name, MultiControlNetModel())
    flat = Conditioning.of(["a", "b"], call={"image": [A, B]})
    assert flat.arguments(pipeline, 1, 1)["image"] == [A, B]
    nested = Conditioning.of(["a", "b"], call={"image": [[A, B], C]})
    assert nested.arguments(pipeline, 1, 1)["image"] == [[B], C]
