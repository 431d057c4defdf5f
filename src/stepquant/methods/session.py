"""The mutable state that a recipe's steps share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from stepquant.calibration.guidance import mixing_weights
from stepquant.calibration.influence import image_gradients, influence_spectrum
from stepquant.calibration.initialize import initialize_ranges
from stepquant.calibration.observe import quant_attention, quant_layers
from stepquant.calibration.spill import Spill
from stepquant.calibration.trajectories import Draw, Trajectories
from stepquant.models.adapter import DenoiserAdapter
from stepquant.models.attention_processor import PRODUCTS
from stepquant.quantizers import QuantAttention, QuantLayer, StepContext
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter
from stepquant.support.work_folder import WorkFolder

IMAGES_FOR_GRADIENTS = 16
SAMPLES_PER_STEP = 64  # images whose inputs give the ranges


@dataclass
class Session:
    """A float model, its quantized simulation, and everything that the steps need to change it.

    Attributes:
        float_model: the denoiser in float32; steps leave it unchanged.
        model: the simulation, which the steps change in place.
        adapter: the parts of the denoiser's architecture.
        context: the sampling step of the current call, for all quantizers of `model`.
        trajectories: the calibration data, inputs of the denoiser.
        draw: samples more trajectories.
        scheduler: the sampler's scheduler, set to the calibrated steps.
        weight_ranges: search for the initial ranges of weights, "minmax" or "mse".
        activation_ranges: the same for activations.
        seed: seed of everything random.
        reporter: where progress is shown.
        work: finished pieces of the job, for resume.
        spill: allocates large activations, in files if memory is short.
        ranges_ready: whether all quantizers have ranges.
        common_ranges: whether all rows of a step table start from one range over all steps.
        samples_per_step: images whose inputs give the ranges of a sampling step.
        gradients: cache of `image_gradients`.
        spectra: cache of `influence`, by exponent.
        summary: results for the user, JSON values by step.
    """

    float_model: nn.Module
    model: nn.Module
    adapter: DenoiserAdapter
    context: StepContext
    trajectories: Trajectories
    draw: Draw
    scheduler: Any
    weight_ranges: str
    activation_ranges: str
    seed: int
    reporter: Reporter
    work: WorkFolder
    spill: Spill = field(default_factory=Spill)
    ranges_ready: bool = False
    common_ranges: bool = False
    samples_per_step: int = SAMPLES_PER_STEP
    gradients: Tensor | None = None
    spectra: dict[float, Tensor] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    def attention(self) -> dict[str, QuantAttention]:
        """The simulated attention products by the name of their attention module."""
        return {
            name.removesuffix(PRODUCTS): products
            for name, products in quant_attention(self.model).items()
        }

    def layers(self) -> dict[str, QuantLayer]:
        """The simulated layers by name."""
        return quant_layers(self.model)

    @cached_property
    def mixing(self) -> Tensor | None:
        """Weights by which guidance mixes an image's predictions; see `calibration.guidance`."""
        return mixing_weights(self.float_model, self.scheduler, self.trajectories)

    def image_gradients(self) -> Tensor:
        """Gradients of calibration images by the predictions of all steps, `[T, images, C, H, W]`.

        With guidance, the gradients are those by the mixed predictions. Computed once, and kept in
        the work folder.

        Raises:
            StepQuantError: the way the sampler mixes predictions is not known.
        """
        if self.gradients is None:
            kept = self.work.load("image_gradients")
            if kept is None:
                found = image_gradients(
                    self.float_model,
                    self.scheduler,
                    self.trajectories,
                    IMAGES_FOR_GRADIENTS,
                    self.seed,
                    self.reporter,
                    self.mixing,
                )
                kept = {"gradients": found}
                self.work.save("image_gradients", kept)
            self.gradients = kept["gradients"]
        return self.gradients

    def influence(self, exponent: float) -> Tensor:
        """Weights `[T, H, W]` of prediction errors, by sampling step and spatial frequency.

        The weights are the influence of an error on the image, raised to `exponent` and scaled to a
        mean of 1.

        Raises:
            StepQuantError: as in `image_gradients`.
        """
        if exponent not in self.spectra:
            weights = influence_spectrum(self.image_gradients()).pow(exponent)
            self.spectra[exponent] = weights / weights.mean()
        return self.spectra[exponent]

    def ensure_ranges(self) -> None:
        """Initialize all ranges, once: later calls do nothing. Resumed jobs load them."""
        if self.ranges_ready:
            return
        kept = self.work.load("ranges")
        if kept is None:
            initialize_ranges(
                self.model,
                self.trajectories,
                self.weight_ranges,
                self.activation_ranges,
                self.seed,
                self.samples_per_step,
                self.reporter,
                self.common_ranges,
            )
            self.work.save("ranges", dict(self.model.state_dict()))
        else:
            self.model.load_state_dict(kept)
            for layer in self.layers().values():
                layer.quantizing = True
            for attention in self.attention().values():
                attention.quantizing = True
        self.ranges_ready = True

    def require_no_ranges(self, step: str) -> None:
        """Refuse a `step` that changes the tensors behind the ranges once these are set.

        Raises:
            StepQuantError: ranges are set.
        """
        if self.ranges_ready:
            raise StepQuantError(
                f"step '{step}' comes after one that needs ranges: expected it earlier; move it "
                "to the front of the recipe"
            )
