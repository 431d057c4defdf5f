"""One file per idea of a paper; each is a step of a recipe."""

from stepquant.methods.block_distillation import BlockDistillation
from stepquant.methods.smoothing import Smoothing
from stepquant.methods.step import Step
from stepquant.methods.temporal_quantizer import TemporalQuantizer
from stepquant.methods.weight_dilation import WeightDilation

STEPS: dict[str, type[Step]] = {
    step.name: step for step in (WeightDilation, Smoothing, TemporalQuantizer, BlockDistillation)
}

__all__ = [
    "STEPS",
    "BlockDistillation",
    "Smoothing",
    "Step",
    "TemporalQuantizer",
    "WeightDilation",
]
