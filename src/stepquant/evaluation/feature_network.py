"""A compact residual classifier whose penultimate features serve `fd_fashion` and `fd_cifar10`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stepquant.evaluation.extra import evaluate_extra
from stepquant.support.errors import StepQuantError

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance


def _convolution(c_in: int, c_out: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution without bias, followed by batch normalization."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(c_out)
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut: `[N, C_in, H, W]` to `[N, C_out, H/s, W/s]`."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(c_in, c_out, 3, stride)
        self.second = _convolution(c_out, c_out, 3)
        same = c_in == c_out and stride == 1
        self.shortcut: nn.Module = nn.Identity() if same else _convolution(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Output `[N, C_out, H/s, W/s]` of the block for `x [N, C_in, H, W]`."""
        y = self.second(torch.relu(self.first(x)))
        return torch.relu(y + self.shortcut(x))


class FeatureNetwork(nn.Module):
    """A residual classifier of small images; `forward` returns its penultimate features.

    The network has a 3x3 stem of `width` channels, three stages of `width`, 2 `width` and 4 `width`
    channels, and a 1x1 convolution to `features` channels. Its rectified output is averaged over
    space, as in Inception's last pooling layer, so the features are non-negative and depend on
    texture as well as on class.

    Args:
        in_channels: channels of an image.
        width: channels of the stem and of the first stage.
        features: length D of the feature vector, available as `num_features`.
        classes: number of logits.
        blocks: residual blocks in each of the three stages.
        first_stride: stride of the first stage; 2 makes the network three to four times cheaper,
            1 keeps the detail of full-size images. The two later stages have stride 2.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        features: int,
        classes: int,
        blocks: Sequence[int] = (1, 1, 1),
        first_stride: int = 2,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_features = features
        self.stem = _convolution(in_channels, width, 3)
        stages: list[nn.Module] = []
        c_in = width
        for stage, depth in enumerate(blocks):
            c_out = width * 2**stage
            for block in range(depth):
                stride = 1 if block > 0 else 2 if stage > 0 else first_stride
                stages.append(ResidualBlock(c_in, c_out, stride))
                c_in = c_out
        self.stages = nn.Sequential(*stages)
        self.project = _convolution(c_in, features, 1)
        self.head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Penultimate features `[N, D]`, float32, of `images [N, C, 32, 32]`, float in [0, 1]."""
        x = torch.relu(self.stem(images * 2 - 1))
        x = torch.relu(self.project(self.stages(x)))  # [N, D, H', W']
        return x.float().mean((2, 3))

    def classify(self, images: Tensor) -> Tensor:
        """Logits `[N, classes]` of `images [N, C, 32, 32]`, float in [0, 1]."""
        return self.head(self.forward(images))


class ReadyFeatures(nn.Module):
    """Identity network that lets torchmetrics work on precomputed features `[N, D]`."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Return `features`."""
        return features


def frechet_metric(num_features: int) -> FrechetInceptionDistance:
    """Torchmetrics' Fréchet distance over precomputed features `[N, num_features]`, not images.

    The sums are float64 for features of any dtype. `compute` returns the dtype of the features
    passed last, so pass float64. `reset` keeps the real side, and `state_dict` holds all six state
    tensors (`real_features_sum`, `real_features_cov_sum`, `real_features_num_samples` and their
    `fake_` counterparts).

    Raises:
        StepQuantError: torchmetrics is not installed, or `num_features` is below one.
    """
    if num_features < 1:
        raise StepQuantError(f"num_features is {num_features}: expected one or more")
    with evaluate_extra():
        from torchmetrics.image.fid import FrechetInceptionDistance
    metric = FrechetInceptionDistance(ReadyFeatures(num_features), reset_real_features=False)
    metric.persistent(True)
    return metric
