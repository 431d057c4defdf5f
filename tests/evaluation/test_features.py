import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepquant.evaluation import FeatureNetwork, frechet_distance, frechet_metric, load_features
from stepquant.support.errors import StepQuantError

SIZES = {"in_channels": 1, "width": 4, "features": 6, "classes": 3}


@pytest.fixture
def folder(tmp_path):
    """A complete asset, untrained and small."""
    torch.manual_seed(0)
    path = tmp_path / "tiny-features"
    path.mkdir()
    net = FeatureNetwork(**SIZES).eval()
    (path / "config.json").write_text(json.dumps({"sizes": SIZES, "seed": 0}))
    weights = {n: v.half() if v.is_floating_point() else v for n, v in net.state_dict().items()}
    save_file(weights, path / "model.safetensors")
    metric = frechet_metric(SIZES["features"])
    metric.update(torch.rand(20, SIZES["features"]), real=True)
    state = {n: v for n, v in metric.state_dict().items() if n.startswith("real_")}
    save_file(state, path / "train_statistics.safetensors")
    return path


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (7, 1, 32, 32), dtype=torch.uint8, generator=generator)


def edit(path, **tensors):
    """Replace tensors of a safetensors file; None takes one out."""
    content = {**load_file(path), **tensors}
    save_file({name: value for name, value in content.items() if value is not None}, path)


def test_loads_a_folder(folder, images):
    extractor = load_features(folder)
    features = extractor(images)
    assert (extractor.name, extractor.num_features) == ("tiny", 6)
    assert features.shape == (7, 6)
    assert features.dtype == torch.float32
    assert features.device.type == "cpu"
    assert not features.is_inference()
    assert int(extractor.reference["real_features_num_samples"]) == 20
    assert not extractor.network.training


def test_a_path_is_not_completed_to_another_folder(folder):
    with pytest.raises(StepQuantError, match="tiny' were not found"):
        load_features(folder.with_name("tiny"))


def test_features_do_not_depend_on_the_batch_size(folder, images):
    whole, parts = load_features(folder)(images), load_features(folder, batch=3)(images)
    torch.testing.assert_close(whole, parts)


def test_uint8_and_float_images_give_the_same_features(folder, images):
    extractor = load_features(folder)
    assert torch.equal(extractor(images), extractor(images.double() / 255))
    nearly = (images.float() / 255 + 1e-3).clamp(0, 1)  # less than half a step of 8 bits
    assert torch.equal(extractor(images), extractor(nearly))


def test_features_are_those_of_the_network(folder, images):
    extractor = load_features(folder)
    with torch.no_grad():
        expected = extractor.network(images.float() / 255)
    torch.testing.assert_close(extractor(images), expected)


def test_classes_are_those_of_the_networks_classifier(folder, images):
    extractor = load_features(folder, batch=3)
    images = (images * torch.linspace(0, 1, 7).view(-1, 1, 1, 1)).to(torch.uint8)
    network = extractor.network
    with torch.no_grad():  # one class or the other, where the untrained head has one for all
        network.head.bias.copy_(-network.head.weight @ network(images.float() / 255).mean(0))
        expected = network.classify(images.float() / 255).argmax(1)
    found = extractor.classes(images)
    assert len(set(expected.tolist())) > 1
    assert torch.equal(found, expected)
    assert found.dtype == torch.int64
    assert not found.is_inference()


def test_classes_of_wrong_images_are_refused(folder):
    with pytest.raises(StepQuantError, match=r"\[2, 3, 32, 32\]: expected \[N, 1, 32, 32\]"):
        load_features(folder).classes(torch.zeros(2, 3, 32, 32))


def test_a_folder_without_statistics_has_no_reference(folder):
    (folder / "train_statistics.safetensors").unlink()
    assert load_features(folder).reference is None


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        pytest.param((2, 3, 32, 32), r"\[2, 3, 32, 32\]: expected \[N, 1, 32, 32\]", id="colours"),
        pytest.param((2, 1, 28, 28), r"\[2, 1, 28, 28\]: expected \[N, 1, 32, 32\]", id="size"),
        pytest.param((1, 32, 32), r"\[1, 32, 32\]: expected \[N, 1, 32, 32\]", id="no batch"),
        pytest.param((0, 1, 32, 32), "no images for the features 'tiny'", id="empty"),
    ],
)
def test_images_of_a_wrong_shape(folder, shape, message):
    with pytest.raises(StepQuantError, match=message):
        load_features(folder)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param(-1.0, "values from -1 to 0: expected 0 to 1", id="signed"),
        pytest.param(255.0, "values from 0 to 255: expected 0 to 1", id="8 bits as float"),
        pytest.param(float("nan"), "values from nan to nan: expected 0 to 1", id="nan"),
    ],
)
def test_images_out_of_range(folder, value, message):
    images = torch.zeros(2, 1, 32, 32)
    images[1, 0, 3, 4] = value
    with pytest.raises(StepQuantError, match=message):
        load_features(folder)(images)


def test_images_of_a_wrong_dtype(folder):
    with pytest.raises(StepQuantError, match=r"torch\.int64: expected floating point"):
        load_features(folder)(torch.zeros(2, 1, 32, 32, dtype=torch.int64))


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(StepQuantError, match=r"features 'fasion' .* expected one of .*fashion"):
        load_features("fasion")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{", "could not be read as JSON", id="not json"),
        pytest.param("[]", "'sizes' of .* is None: expected a mapping", id="a list"),
        pytest.param('{"sizes": {"width": 4}}', "expected a mapping with classes", id="too few"),
        pytest.param(
            json.dumps({"sizes": {**SIZES, "depth": 3}}), "does not describe", id="unknown size"
        ),
        pytest.param(
            json.dumps({"sizes": {**SIZES, "width": "4"}}), "does not describe", id="a string"
        ),
    ],
)
def test_a_bad_configuration(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(StepQuantError, match=message):
        load_features(folder)


def test_a_missing_file(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(StepQuantError, match=r"model\.safetensors could not be read"):
        load_features(folder)


def test_a_pickle_is_not_loaded(folder):
    torch.save({"head.bias": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(StepQuantError, match="expected a safetensors file"):
        load_features(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        pytest.param({"head.bias": None}, r"'head\.bias' .* is nothing: expected \[3\]", id="gone"),
        pytest.param(
            {"head.bias": torch.zeros(4)}, r"'head\.bias' .* is \[4\]: expected \[3\]", id="shape"
        ),
        pytest.param(
            {"extra": torch.zeros(4)}, r"'extra' .* is \[4\]: expected no such tensor", id="extra"
        ),
        pytest.param(
            {"head.bias": torch.full((3,), torch.inf)}, r"'head\.bias' .* not finite", id="infinite"
        ),
    ],
)
def test_bad_weights(folder, tensors, message):
    edit(folder / "model.safetensors", **tensors)
    with pytest.raises(StepQuantError, match=message):
        load_features(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        pytest.param(
            {"real_features_sum": None}, r"is missing: expected shape \[6\]", id="missing"
        ),
        pytest.param(
            {"real_features_cov_sum": torch.zeros(5, 5)}, r"is \[5, 5\]: expected", id="shape"
        ),
        pytest.param({"real_features_sum": torch.full((6,), torch.nan)}, "not finite", id="nan"),
        pytest.param(
            {"real_features_num_samples": torch.tensor(1)}, "is 1: expected two", id="one sample"
        ),
    ],
)
def test_bad_statistics(folder, tensors, message):
    edit(folder / "train_statistics.safetensors", **tensors)
    with pytest.raises(StepQuantError, match=message):
        load_features(folder)


def test_the_shipped_fashion_features():
    extractor = load_features("fashion")
    assert (extractor.name, extractor.num_features) == ("fashion", 64)
    assert int(extractor.reference["real_features_num_samples"]) == 60_000
    noise = torch.rand(200, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    black = torch.zeros(200, 1, 32, 32) + noise / 50
    # Neither is clothing; both are far from the data, where the test set is within 1.
    assert frechet_distance(extractor(noise), extractor.reference) > 5
    assert frechet_distance(extractor(black), extractor.reference) > 5
