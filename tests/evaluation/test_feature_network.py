import pytest
import torch

from stepquant.evaluation import FeatureNetwork, frechet_metric
from stepquant.support.errors import StepQuantError

FASHION = {"in_channels": 1, "width": 24, "features": 64, "classes": 10}
CIFAR10 = {"in_channels": 3, "width": 40, "features": 128, "classes": 10}


@pytest.mark.parametrize(
    ("sizes", "most_parameters"),
    [
        pytest.param(FASHION, 300_000, id="fashion"),
        pytest.param(CIFAR10, 1_000_000, id="cifar10"),
        pytest.param({**CIFAR10, "blocks": [2, 2, 1], "first_stride": 1}, 1_000_000, id="deep"),
    ],
)
def test_shapes_and_size(sizes, most_parameters):
    net = FeatureNetwork(**sizes).eval()
    images = torch.rand(3, sizes["in_channels"], 32, 32)
    features, logits = net(images), net.classify(images)
    assert features.shape == (3, sizes["features"])
    assert features.dtype == torch.float32
    assert logits.shape == (3, sizes["classes"])
    assert net.num_features == sizes["features"]
    assert sum(p.numel() for p in net.parameters()) <= most_parameters


def test_logits_are_a_linear_map_of_the_features():
    net = FeatureNetwork(**FASHION).eval()
    images = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(net.classify(images), net.head(net(images)))


def test_features_are_float32_under_autocast():
    net = FeatureNetwork(1, 4, 6, 2).eval()
    with torch.autocast("cpu", torch.bfloat16):
        features = net(torch.rand(2, 1, 32, 32))
    assert features.dtype == torch.float32


def test_every_parameter_gets_a_gradient():
    net = FeatureNetwork(1, 4, 6, 3)
    loss = net.classify(torch.rand(8, 1, 32, 32)).logsumexp(1).sum()
    loss.backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_metric_state_is_saved_and_restored():
    metric = frechet_metric(3)
    rows = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    metric.update(rows, real=True)
    state = metric.state_dict()
    assert {name for name in state if name.startswith("real_")} == {
        "real_features_sum",
        "real_features_cov_sum",
        "real_features_num_samples",
    }
    assert state["real_features_sum"].dtype == torch.float64
    assert state["real_features_sum"].tolist() == [5.0, 7.0, 9.0]
    assert state["real_features_cov_sum"][0].tolist() == [17.0, 22.0, 27.0]
    assert int(state["real_features_num_samples"]) == 2


def test_metric_keeps_the_real_side_at_reset():
    metric = frechet_metric(2)
    metric.update(torch.eye(2), real=True)
    metric.update(torch.eye(2), real=False)
    metric.reset()
    assert int(metric.real_features_num_samples) == 2
    assert int(metric.fake_features_num_samples) == 0


def test_metric_of_no_features_is_an_error():
    with pytest.raises(StepQuantError, match="num_features is 0: expected one or more"):
        frechet_metric(0)
