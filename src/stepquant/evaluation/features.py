"""Feature extractors: a trained network and the statistics of its training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepquant.evaluation.feature_network import FeatureNetwork
from stepquant.evaluation.reference_statistics import check_statistics
from stepquant.support.errors import StepQuantError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SUFFIX = "-features"
SIZE = 32  # all networks are trained on 32 x 32 images
SIZE_KEYS = {"in_channels", "width", "features", "classes"}


class FeatureExtractor:
    """Turns images into feature vectors.

    Attributes:
        name: suffix of the distances over these features, `fd_<name>`.
        num_features: length D of a feature vector.
        reference: state of torchmetrics' Fréchet distance over the training data
            (`real_features_sum [D]`, `real_features_cov_sum [D, D]`, `real_features_num_samples`),
            an argument of `frechet_distance`; None if the folder has no statistics.
    """

    def __init__(
        self,
        name: str,
        network: FeatureNetwork,
        reference: dict[str, Tensor] | None = None,
        device: str | torch.device = "cpu",
        batch: int = 100,
    ) -> None:
        self.name = name
        self.num_features = network.num_features
        self.reference = reference
        self.device = torch.device(device)
        self.batch = batch
        self.network = network.eval().to(self.device)

    def __repr__(self) -> str:
        return f"FeatureExtractor(name={self.name!r}, num_features={self.num_features})"

    @torch.inference_mode()
    def _features(self, images: Tensor) -> Tensor:
        images = images.to(self.device)
        if images.dtype != torch.uint8:
            # Saved images have 8 bits, and so had those behind the reference statistics.
            images = (images.float() * 255).round()
        pixels = images.float().div(255).contiguous(memory_format=torch.channels_last)
        return self.network(pixels).cpu()

    def __call__(self, images: Tensor) -> Tensor:
        """Features of `images`, computed in batches.

        Args:
            images: `[N, C, 32, 32]`, uint8, or floating point in [0, 1]. Floating-point images
                are rounded to 8 bits first, so their features are those of the saved images.

        Returns:
            `[N, D]` float32 on the CPU.

        Raises:
            StepQuantError: wrong shape or dtype, or values that are not finite or not in [0, 1].
        """
        expected = f"[N, {self.network.in_channels}, {SIZE}, {SIZE}]"
        if images.ndim != 4 or tuple(images.shape[1:]) != (self.network.in_channels, SIZE, SIZE):
            raise StepQuantError(
                f"images for the features '{self.name}' have shape {list(images.shape)}: "
                f"expected {expected}"
            )
        if len(images) == 0:
            raise StepQuantError(
                f"there are no images for the features '{self.name}': expected {expected} with N "
                "of one or more"
            )
        if images.dtype != torch.uint8:
            check_unit_range(images, f"images for the features '{self.name}'")
        return torch.cat([self._features(part) for part in images.split(self.batch)]).clone()

    def classes(self, images: Tensor) -> Tensor:
        """The class that the network's classifier assigns to each image.

        Args:
            images: as in `__call__`.

        Returns:
            `[N]` int64 on the CPU: class numbers of the training data.

        Raises:
            StepQuantError: as in `__call__`.
        """
        features = self(images).to(self.device)
        with torch.no_grad():
            return self.network.head(features).argmax(1).cpu()


def check_unit_range(images: Tensor, what: str) -> None:
    """Require floating-point `images` with finite values in [0, 1]; errors call them `what`.

    Raises:
        StepQuantError: another dtype, or a value that is NaN or outside [0, 1].
    """
    if not images.is_floating_point():
        raise StepQuantError(
            f"{what} have dtype {images.dtype}: expected floating point in [0, 1]; "
            "divide 8-bit images by 255"
        )
    low, high = (float(value) for value in torch.aminmax(images.detach().float()))
    if not (low >= 0 and high <= 1):  # written so that NaN fails it
        raise StepQuantError(
            f"{what} have values from {low:.4g} to {high:.4g}: expected 0 to 1; "
            "map a sampler's [-1, 1] with (x / 2 + 0.5).clamp(0, 1)"
        )


def load_features(
    name_or_path: str | Path, device: str | torch.device = "cpu", batch: int = 100
) -> FeatureExtractor:
    """Load a feature extractor by the name of a shipped one or from a folder.

    Args:
        name_or_path: a name such as "fashion", which means `stepquant/assets/fashion-features`,
            or the path of a folder that `training/train_features.py` wrote: `config.json`,
            `model.safetensors` and, optionally, `train_statistics.safetensors`.
        device: device of the network.
        batch: images per forward pass.

    Raises:
        StepQuantError: no such name or folder, or a file in the folder is unreadable or does not
            match its `config.json`.
    """
    folder = Path(name_or_path)
    if folder.name == str(name_or_path) and (ASSETS / f"{name_or_path}{SUFFIX}").is_dir():
        folder = ASSETS / f"{name_or_path}{SUFFIX}"
    if not folder.is_dir():
        shipped = sorted(path.name.removesuffix(SUFFIX) for path in ASSETS.glob(f"*{SUFFIX}"))
        raise StepQuantError(
            f"features '{name_or_path}' were not found: expected one of "
            f"{', '.join(shipped) or '(none shipped)'}, or a folder that "
            "training/train_features.py wrote"
        )
    network = _build(folder / "config.json")
    weights = _tensors(folder / "model.safetensors")
    expected = network.state_dict()
    for key in sorted(weights.keys() | expected.keys()):
        found = list(weights[key].shape) if key in weights else "nothing"
        wanted = list(expected[key].shape) if key in expected else "no such tensor"
        if found != wanted:
            raise StepQuantError(
                f"tensor '{key}' of {folder / 'model.safetensors'} is {found}: expected {wanted} "
                "from config.json; write the folder again with training/train_features.py"
            )
        if not bool(weights[key].isfinite().all()):
            raise StepQuantError(
                f"tensor '{key}' of {folder / 'model.safetensors'} has values that are not finite: "
                "write the folder again with training/train_features.py"
            )
    network.load_state_dict(weights)
    reference = None
    statistics = folder / "train_statistics.safetensors"
    if statistics.is_file():
        reference = check_statistics(
            _tensors(statistics), network.num_features, f"the statistics in {statistics}"
        )
    return FeatureExtractor(
        folder.resolve().name.removesuffix(SUFFIX), network, reference, device, batch
    )


def _build(path: Path) -> FeatureNetwork:
    """The network described by `sizes` in a `config.json`, without its weights."""
    try:
        config: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StepQuantError(
            f"{path} could not be read as JSON ({error}): expected the configuration that "
            "training/train_features.py writes"
        ) from error
    sizes = config.get("sizes") if isinstance(config, dict) else None
    if not isinstance(sizes, dict) or not sizes.keys() >= SIZE_KEYS:
        raise StepQuantError(
            f"'sizes' of {path} is {sizes!r}: expected a mapping with "
            f"{', '.join(sorted(SIZE_KEYS))}"
        )
    try:
        return FeatureNetwork(**sizes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise StepQuantError(
            f"'sizes' of {path} does not describe a feature network ({error}): expected the "
            "arguments of stepquant.evaluation.FeatureNetwork"
        ) from error


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StepQuantError(
            f"{path} could not be read ({error}): expected a safetensors file that "
            "training/train_features.py writes"
        ) from error
