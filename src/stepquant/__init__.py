"""stepquant: low-bit diffusion models that are smaller on disk and run in integer arithmetic.

    import stepquant

    stepquant.quantize("builtin:fashion-ddpm", weights=4, activations=8, out="w4a8")
    images = stepquant.sample("w4a8", num=16)

Importing stepquant lets `from_pretrained` of diffusers, and of transformers where it is installed,
load stepquant checkpoints. Each public name is imported when it is first used, so that
`import stepquant` itself loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stepquant.lora import peft_bridge
from stepquant.support.late_registration import register_late
from stepquant.support.moved_modules import keep_old_names
from stepquant.support.old_module_names import OLD_MODULE_NAMES
from stepquant.support.version import __version__

if TYPE_CHECKING:
    from stepquant.api import (
        Comparison,
        DenoiserAdapter,
        DenoiserPipeline,
        DiffusersAdapter,
        DynamicConfig,
        OpenVinoDenoiser,
        Quantized,
        RecordedDenoiser,
        Session,
        Step,
        StepQuantError,
        WeightBytes,
        WeightOnlyConfig,
        bench,
        demo,
        evaluate,
        general_adapter,
        inspect,
        load,
        load_lora,
        load_module,
        load_recipe,
        lora_scales,
        quantize,
        recipe_names,
        register_adapter,
        register_kernel,
        register_metric,
        register_step,
        sample,
        set_attention_precision,
        set_backend,
        set_lora_scales,
        set_memory_mode,
        slow_paths,
        unload_lora,
        weight_bytes_resident,
    )

# The module that each public name comes from, and what it is called there if not the same.
_HOMES = {
    "Comparison": "evaluation.metric",
    "DenoiserAdapter": "models.adapter",
    "DenoiserPipeline": "pipelines.denoiser_pipeline",
    "DiffusersAdapter": "models.base",
    "DynamicConfig": "weight_only.config",
    "OpenVinoDenoiser": "engines.openvino_denoiser",
    "Quantized": "verbs.quantized",
    "RecordedDenoiser": "engines.captured_calls",
    "Session": "methods.session",
    "Step": "methods.step",
    "StepQuantError": "support.errors",
    "WeightBytes": "runtime.layers.resident",
    "WeightOnlyConfig": "weight_only.config",
    "bench": "verbs.bench",
    "demo": "verbs.demo",
    "evaluate": "verbs.evaluate",
    "general_adapter": "calibration.survey",
    "inspect": "verbs.inspect",
    "load": "pipelines.opening:open_pipeline",
    "load_lora": "lora.pipeline",
    "load_module": "checkpoint.module",
    "load_recipe": "methods.recipe",
    "lora_scales": "lora.pipeline",
    "quantize": "verbs.quantize",
    "recipe_names": "methods.recipe",
    "register_adapter": "models.adapter",
    "register_kernel": "runtime.kernels",
    "register_metric": "evaluation.metric",
    "register_step": "methods.step",
    "sample": "verbs.sample",
    "set_attention_precision": "runtime.blocks.attention_precision",
    "set_backend": "engines.backend",
    "set_lora_scales": "lora.pipeline",
    "set_memory_mode": "runtime.layers.resident",
    "slow_paths": "engines.slow_paths",
    "unload_lora": "lora.pipeline",
    "weight_bytes_resident": "runtime.layers.resident",
}

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
    "__version__",
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


def __getattr__(name: str) -> Any:
    """The public name, imported at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'stepquant' has no attribute '{name}'")
    module, _, attribute = _HOMES[name].partition(":")
    found = getattr(importlib.import_module(f"stepquant.{module}"), attribute or name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """All public names, imported or not."""
    return sorted({*globals(), *__all__})


_WEIGHT_ONLY_CONFIGS = {
    "stepquant_weight_only": ("stepquant.weight_only.config", "WeightOnlyConfig"),
    "stepquant_dynamic": ("stepquant.weight_only.config", "DynamicConfig"),
}
register_late(
    "diffusers.quantizers.auto",
    {
        "AUTO_QUANTIZER_MAPPING": {
            "stepquant": ("stepquant.checkpoint.plugin", "StepQuantQuantizer"),
            **dict.fromkeys(
                _WEIGHT_ONLY_CONFIGS, ("stepquant.weight_only.quantizers", "WeightOnlyQuantizer")
            ),
        },
        "AUTO_QUANTIZATION_CONFIG_MAPPING": {
            "stepquant": ("stepquant.checkpoint.config", "StepQuantConfig"),
            **_WEIGHT_ONLY_CONFIGS,
        },
    },
)
register_late(
    "transformers.quantizers.auto",
    {
        "AUTO_QUANTIZER_MAPPING": dict.fromkeys(
            _WEIGHT_ONLY_CONFIGS, ("stepquant.weight_only.text", "TextWeightOnlyQuantizer")
        ),
        "AUTO_QUANTIZATION_CONFIG_MAPPING": _WEIGHT_ONLY_CONFIGS,
    },
)
peft_bridge.register()
keep_old_names(
    {
        f"stepquant.{old}": tuple(f"stepquant.{name}" for name in new.split())
        for old, new in OLD_MODULE_NAMES.items()
    }
)
