from __future__ import annotations

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from stepquant.api import DenoiserPipeline, inspect, sample
from stepquant.calibration.conditions import ConditionRecorder, Conditions
from stepquant.calibration.trajectories import Trajectories, capture_trajectories, predict
from stepquant.pipelines.conditioning import Conditioning
from stepquant.support.errors import StepQuantError

CLASSES = 5  # of which the last stands for none


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        num_class_embeds=CLASSES,
    ).eval()


class Guided(DDPMPipeline):
    """Classifier-free guidance in one call with both halves, or in two calls."""

    passes = 1

    @torch.no_grad()
    def __call__(
        self, class_labels, generator, num_inference_steps, output_type, guidance_scale=3.0
    ):
        x = torch.cat([torch.randn(1, 1, 8, 8, generator=one) for one in generator])
        labels = torch.tensor(class_labels)
        none = torch.full_like(labels, CLASSES - 1)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            if guidance_scale == 1:
                noise = self.unet(x, t, class_labels=labels).sample
            else:
                if self.passes == 1:
                    both = self.unet(torch.cat([x, x]), t, torch.cat([none, labels])).sample
                    without, given = both.chunk(2)
                else:
                    without = self.unet(x, t, class_labels=none).sample
                    given = self.unet(x, t, class_labels=labels).sample
                noise = without + guidance_scale * (given - without)
            x = self.scheduler.step(noise, t, x).prev_sample
        return ImagePipelineOutput(images=(x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())


def guided(unet, passes=1):
    pipeline = Guided(unet, DDPMScheduler())
    pipeline.passes = passes
    return pipeline


def captured(unet, passes=1, num=3, batch=2, **conditioning):
    conditioning = Conditioning.of(labels=[2, 0], **conditioning)
    pipeline = guided(unet, passes)
    return capture_trajectories(pipeline, num, 3, 7, "ddim", batch=batch, conditioning=conditioning)


def test_without_guidance_each_input_has_its_label(unet):
    found = captured(unet, guidance=1.0)
    assert not found.guided
    assert len(found) == 9
    labels = found.conditions.arguments()["class_labels"]
    assert labels.tolist() == [[2, 0, 2][image] for image in found.trajectory.tolist()]


@pytest.mark.parametrize("passes", [1, 2], ids=["one pass", "two passes"])
def test_with_guidance_an_image_has_both_inputs_at_each_step(unet, passes):
    found = captured(unet, passes)
    assert found.guided
    assert len(found) == 18
    labels = found.conditions.arguments()["class_labels"]
    for row in range(3):
        at = found.rows(row)
        assert found.trajectory[at].tolist() == [0, 0, 1, 1, 2, 2]
        assert labels[at].tolist() == [4, 2, 4, 0, 4, 2]
        pairs = found.sample[at].unflatten(0, (3, 2))
        assert torch.equal(pairs[:, 0], pairs[:, 1])


@pytest.mark.parametrize("passes", [1, 2], ids=["one pass", "two passes"])
def test_the_first_images_of_a_step_come_with_all_their_inputs(unet, passes):
    found = captured(unet, passes)
    for row in range(3):
        assert found.step(row, 2).trajectory.tolist() == [0, 0, 1, 1]
        assert len(found.step(row, 3)) == len(found.step(row)) == 6


def test_inspection_sees_all_inputs_of_its_images(unet):
    pipeline, conditions = guided(unet), {"labels": [2, 0], "guidance": 3.0}
    record = inspect(pipeline, steps=3, num=3, **conditions)
    batches = []
    handle = unet.conv_in.register_forward_pre_hook(lambda _m, args: batches.append(args[0]))
    try:
        sample(pipeline, 3, 3, **conditions)
    finally:
        handle.remove()
    (layer,) = [layer for layer in record["layers"] if layer["layer"] == "conv_in"]
    assert layer["low"] == pytest.approx([float(x.min()) for x in batches], rel=1e-4)
    assert layer["high"] == pytest.approx([float(x.max()) for x in batches], rel=1e-4)


def test_one_and_two_passes_are_the_same_inputs(unet):
    one, two = captured(unet, 1), captured(unet, 2)
    torch.testing.assert_close(one.sample, two.sample)
    assert torch.equal(one.timestep, two.timestep)
    assert torch.equal(one.trajectory, two.trajectory)
    for name, value in one.conditions.arguments().items():
        assert torch.equal(value, two.conditions.arguments()[name])


def test_the_batch_changes_nothing(unet):
    whole, single = captured(unet, batch=3), captured(unet, batch=1)
    order = [
        torch.tensor(sorted(range(18), key=lambda i: (found.trajectory[i], -found.timestep[i])))
        for found in (whole, single)
    ]
    whole, single = whole.take(order[0]), single.take(order[1])
    torch.testing.assert_close(whole.sample, single.sample, rtol=1e-4, atol=1e-4)
    labels = [found.conditions.arguments()["class_labels"] for found in (whole, single)]
    assert torch.equal(*labels)


def test_predictions_are_those_of_the_sampler(unet):
    seen = []
    handle = unet.register_forward_hook(lambda _m, _a, output: seen.append(output.sample))
    try:
        found = captured(unet, num=1)
    finally:
        handle.remove()
    again = predict(unet, found)  # step by step, without condition and with
    torch.testing.assert_close(again, torch.cat(seen), rtol=1e-4, atol=1e-5)


def test_a_part_of_the_inputs_keeps_its_conditions(unet):
    found = captured(unet)
    labels = found.conditions.arguments()["class_labels"]
    numbered = Trajectories(
        torch.arange(18.0), found.timestep, found.trajectory, found.timesteps, found.conditions
    )
    for part in (numbered.subset(7, 3), numbered.step(1, 4), numbered.take(slice(4, 6))):
        assert torch.equal(part.conditions.arguments()["class_labels"], labels[part.sample.long()])


def test_trajectories_survive_as_tensors(unet):
    found = captured(unet)
    again = Trajectories.from_tensors(found.to_tensors())
    assert torch.equal(predict(unet, again), predict(unet, found))


def recorded(*calls):
    recorder = ConditionRecorder("Denoiser")
    for arguments, batch in calls:
        recorder.add(arguments, batch)
    return recorder.conditions()


def test_nested_arguments_come_back_nested():
    ids, texts = torch.arange(12).view(2, 6), torch.randn(2, 3)
    added = {"time_ids": ids, "text_embeds": texts, "resolution": None}
    found = recorded(({"added_cond_kwargs": added, "joint": {}, "scale": 2.5}, 2))
    again = Conditions.from_tensors(found.to_tensors()).arguments()
    assert again.keys() == {"added_cond_kwargs", "joint", "scale"}
    assert again["joint"] == {} and again["scale"] == 2.5
    assert again["added_cond_kwargs"]["resolution"] is None
    assert torch.equal(again["added_cond_kwargs"]["time_ids"], ids)
    assert torch.equal(again["added_cond_kwargs"]["text_embeds"], texts)


def test_tuples_and_lists_of_tensors_come_back_as_such():
    cosine, sine = torch.randn(5, 4), torch.randn(5, 4)  # of tokens
    residuals = [torch.randn(2, 3, 4) for _ in range(11)]  # of samples, more than ten
    given = {
        "rotary": (cosine, sine),
        "residuals": residuals,
        "sizes": (8, 8),
        "pair": (None, sine),
    }
    found = Conditions.from_tensors(recorded((given, 2)).take(torch.tensor([1])).to_tensors())
    again = found.arguments()
    assert isinstance(again["rotary"], tuple) and isinstance(again["residuals"], list)
    assert again["residuals"] is not found.arguments()["residuals"]  # a denoiser may pop entries
    assert all(torch.equal(a, b) for a, b in zip(again["rotary"], (cosine, sine), strict=True))
    assert all(torch.equal(a, b[1:]) for a, b in zip(again["residuals"], residuals, strict=True))
    assert again["sizes"] == [8, 8]  # plain values are kept as JSON keeps them
    assert again["pair"][0] is None and torch.equal(again["pair"][1], sine)


def test_equal_rows_are_kept_once():
    text = torch.randn(2, 7, 5)
    calls = [({"text": torch.cat([text[:1], text[1:]])}, 2) for _ in range(10)]
    found = recorded(*calls)
    assert found.values["text"].shape == (2, 7, 5)
    assert torch.equal(found.arguments()["text"], text.repeat(10, 1, 1))


def test_negative_zero_is_not_zero():
    found = recorded(({"x": torch.tensor([[0.0], [-0.0]])}, 2))
    assert torch.signbit(found.arguments()["x"]).flatten().tolist() == [False, True]


@pytest.mark.parametrize("tokens", [3, 4])
def test_a_tensor_without_a_batch_dimension_is_shared(tokens):
    positions = torch.randn(tokens, 3)  # as many tokens as samples, too
    recorder = ConditionRecorder("Denoiser", by_sample=("label",))
    for _ in range(2):
        recorder.add({"ids": positions, "label": torch.arange(4)}, 4)
    found = recorder.conditions().take(torch.tensor([5])).arguments()
    assert torch.equal(found["ids"], positions)
    assert found["label"].tolist() == [1]


class Tabled(torch.nn.Module):
    """A denoiser with a table of four positions, for a dictionary of conditions."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 1)

    def forward(self, x, timestep, **cond):
        assert cond["table"].shape == (4, 2) and len(cond["label"]) == len(x)
        return self.conv(x) * cond["label"].view(-1, 1, 1, 1)


def with_table(denoiser, noise, steps, generators):
    table = torch.arange(8.0).view(4, 2)
    for t in range(steps, 0, -1):
        label = torch.arange(len(noise)) + 1.0
        noise = noise - denoiser(noise, timestep=torch.tensor(t), table=table, label=label)
    return noise.sigmoid()


@pytest.mark.parametrize("num", [1, 4, 6])
def test_a_table_as_long_as_the_batch_is_no_row_of_a_sample(num):
    """And arguments behind two stars, however these are called, are given by name again."""
    pipeline = DenoiserPipeline(Tabled().eval(), (1, 4, 4), draw=with_table)
    found = capture_trajectories(pipeline, num, 2, 0, None, batch=4)
    assert found.conditions.shared["table"].shape == (4, 2)
    labels = found.take(found.trajectory.argsort(stable=True)).conditions.arguments()["label"]
    assert labels.tolist() == [1.0 + image % 4 for image in range(num) for _ in range(2)]
    for count in (1, 2):
        assert len(predict(pipeline.denoiser, found.take(slice(0, count)))) == count


@pytest.mark.parametrize(("num", "batch"), [(1, 64), (3, 1)])
def test_a_table_of_one_row_is_no_row_of_a_lone_sample(num, batch):
    def draw(denoiser, noise, steps, generators):
        for t in range(steps, 0, -1):
            noise = noise - denoiser(noise, timestep=torch.tensor(t), table=torch.ones(1, 2))
        return noise.sigmoid()

    class Net(Tabled):
        def forward(self, x, timestep, table):
            return self.conv(x)

    pipeline = DenoiserPipeline(Net().eval(), (1, 4, 4), draw=draw)
    found = capture_trajectories(pipeline, num, 2, 0, None, batch=batch)
    assert found.conditions.shared["table"].shape == (1, 2)


def test_arguments_without_names_are_refused():
    class Starred(Tabled):
        def forward(self, x, timestep, *more):
            return self.conv(x)

    pipeline = DenoiserPipeline(Starred().eval(), (1, 4, 4))
    with pytest.raises(
        StepQuantError, match=r"Starred.forward takes '\*more': expected named arguments"
    ):
        capture_trajectories(pipeline, 1, 2, 0, None)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([({"a": torch.ones(3)}, 2), ({"a": torch.zeros(3)}, 2)], "'a', which changes between"),
        ([({"a": 1}, 2), ({"a": 2}, 2)], "got 2 as 'a' after 1"),
        ([({"a": object()}, 2)], "got object as 'a'"),
        ([({"a": 1}, 2), ({"b": 1}, 2)], r"got the arguments \['b'\] after \['a'\]"),
        ([({"a": 1}, 2), ({}, 2)], "guidance in two passes too; give those that a pass leaves"),
        ([({"a": {5: torch.ones(2)}}, 2)], "a dictionary with the key 5 in 'a'"),
        ([({"a": {"b.c": 1}}, 2)], "a dictionary with the key 'b.c' in 'a'"),
        ([({"a": torch.ones(2, 3)}, 2), ({"a": torch.ones(2, 4)}, 2)], "pad prompts to one"),
        ([({"a": torch.ones(2, 3)}, 2), ({"a": torch.ones(1, 3)}, 2)], "for 2 samples"),
    ],
)
def test_what_cannot_be_kept_is_told(calls, message):
    with pytest.raises(StepQuantError, match=f"Denoiser .*{message}"):
        recorded(*calls)
