"""The steps of recipes, one file per paper's idea.

The registry imports every file of this room, so a new step needs no line here.
"""

from stepquant.methods.step import STEPS, Step, register_step

# Errors list the steps in this order.
# isort: off
from stepquant.methods.weight_dilation import WeightDilation
from stepquant.methods.smoothing import Smoothing
from stepquant.methods.channel_reparameterization import ChannelReparameterization
from stepquant.methods.temporal_quantizer import TemporalQuantizer
from stepquant.methods.outlier_mixed_bits import OutlierMixedBits
from stepquant.methods.bit_allocation import BitAllocation
from stepquant.methods.adaptive_softmax import AdaptiveSoftmax
from stepquant.methods.input_error_bypass import InputErrorBypass
from stepquant.methods.block_distillation import BlockDistillation
from stepquant.methods.block_reconstruction import BlockReconstruction
from stepquant.methods.progressive_alignment import ProgressiveAlignment
from stepquant.methods.low_rank_adapters import LowRankAdapters
from stepquant.methods.trajectory_distillation import TrajectoryDistillation
from stepquant.methods.relation_distillation import RelationDistillation
from stepquant.methods.affine_distillation import AffineDistillation
from stepquant.methods.bias_correction import BiasCorrection
# isort: on

__all__ = [
    "STEPS",
    "AdaptiveSoftmax",
    "AffineDistillation",
    "BiasCorrection",
    "BitAllocation",
    "BlockDistillation",
    "BlockReconstruction",
    "ChannelReparameterization",
    "InputErrorBypass",
    "LowRankAdapters",
    "OutlierMixedBits",
    "ProgressiveAlignment",
    "RelationDistillation",
    "Smoothing",
    "Step",
    "TemporalQuantizer",
    "TrajectoryDistillation",
    "WeightDilation",
    "register_step",
]
