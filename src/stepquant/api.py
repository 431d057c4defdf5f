"""The public names: a function for each verb of the command line, and what plug-ins build on."""

from __future__ import annotations

from stepquant.calibration.survey import general_adapter
from stepquant.checkpoint.module import load_module
from stepquant.engines.backend import set_backend
from stepquant.engines.captured_calls import RecordedDenoiser
from stepquant.engines.openvino_denoiser import OpenVinoDenoiser
from stepquant.engines.slow_paths import slow_paths
from stepquant.evaluation.metric import Comparison, register_metric
from stepquant.lora.pipeline import load_lora, lora_scales, set_lora_scales, unload_lora
from stepquant.methods.recipe import load_recipe, recipe_names
from stepquant.methods.session import Session
from stepquant.methods.step import Step, register_step
from stepquant.models.adapter import DenoiserAdapter, register_adapter
from stepquant.models.base import DiffusersAdapter
from stepquant.pipelines.denoiser_pipeline import DenoiserPipeline
from stepquant.pipelines.opening import open_pipeline as load
from stepquant.runtime.blocks.attention_precision import set_attention_precision
from stepquant.runtime.kernels import register_kernel
from stepquant.runtime.layers.resident import WeightBytes, set_memory_mode, weight_bytes_resident
from stepquant.support.errors import StepQuantError
from stepquant.verbs.bench import bench
from stepquant.verbs.demo import demo
from stepquant.verbs.evaluate import evaluate
from stepquant.verbs.inspect import inspect
from stepquant.verbs.quantize import quantize
from stepquant.verbs.quantized import Quantized
from stepquant.verbs.sample import sample
from stepquant.weight_only.config import DynamicConfig, WeightOnlyConfig
from stepquant.weight_only.conversion import pack

__all__ = [
    "Comparison",
    "DenoiserAdapter",
    "DenoiserPipeline",
    "DiffusersAdapter",
    "DynamicConfig",
    "OpenVinoDenoiser",
    "Quantized",
    "RecordedDenoiser",
    "Session",
    "Step",
    "StepQuantError",
    "WeightBytes",
    "WeightOnlyConfig",
    "bench",
    "demo",
    "evaluate",
    "general_adapter",
    "inspect",
    "load",
    "load_lora",
    "load_module",
    "load_recipe",
    "lora_scales",
    "pack",
    "quantize",
    "recipe_names",
    "register_adapter",
    "register_kernel",
    "register_metric",
    "register_step",
    "sample",
    "set_attention_precision",
    "set_backend",
    "set_lora_scales",
    "set_memory_mode",
    "slow_paths",
    "unload_lora",
    "weight_bytes_resident",
]
