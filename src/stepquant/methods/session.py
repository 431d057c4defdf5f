"""The one mutable thing that the steps of a recipe share."""

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
SAMPLES_PER_STEP = 64  # images whose inputs ranges are taken of


@dataclass
class Session:
    """A float model, its simulated quantized twin, and what the steps need to work on it.

    `model` is quantized in place by the steps; `float_model` stays as it was. `summary` collects,
    step by step, what a user should see (plain JSON values). `draw` samples more trajectories;
    `scheduler` is the sampler's, set to the calibrated steps. `common_ranges`: all rows of a table
    start from the range of all steps together. `spill` makes the large tensors of activations.
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
    gradients: Tensor | None = None  # once they were asked for
    spectra: dict[float, Tensor] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    def attention(self) -> dict[str, QuantAttention]:
        """The simulated products of each attention module, by its name."""
        return {
            name.removesuffix(PRODUCTS): products
            for name, products in quant_attention(self.model).items()
        }

    def layers(self) -> dict[str, QuantLayer]:
        """The simulated layers by name."""
        return quant_layers(self.model)

    @cached_property
    def mixing(self) -> Tensor | None:
        """How the sampler mixes the predictions of an image, see `calibration.guidance`."""
        return mixing_weights(self.float_model, self.scheduler, self.trajectories)

    def image_gradients(self) -> Tensor:
        """Of some calibration images by the predictions of all steps, `[T, images, C, H, W]`.

        With guidance by their mix; StepQuantError where that is not known.
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
        """What an error of the prediction counts, by step and frequency, `[T, H, W]`.

        Its influence on the image to `exponent`; 1 in the mean.
        """
        if exponent not in self.spectra:
            weights = influence_spectrum(self.image_gradients()).pow(exponent)
            self.spectra[exponent] = weights / weights.mean()
        return self.spectra[exponent]

    def ensure_ranges(self) -> None:
        """Initialise all ranges, unless a step has asked for it before."""
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
        """For steps that change what ranges are taken of: they must come first."""
        if self.ranges_ready:
            raise StepQuantError(
                f"step '{step}' comes after one that needs ranges: expected it earlier; move it "
                "to the front of the recipe"
            )
