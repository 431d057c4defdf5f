"""Registration of quantized layers with peft, so that diffusers' own LoRA calls work on them.

peft chooses its LoRA layer by the class of the layer that it wraps, from a fixed list of quantizers
and torch's own layers. It has no registry for other packages: `LoraConfig._register_custom_module`
serves one config, and diffusers makes the configs itself. So this module puts stepquant's layers
in front of that list, the same way for every kind of quantized layer. The wrappers are put in place
when peft and diffusers' loaders are imported, and pass everything else on.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

from stepquant.support.late_registration import when_imported


def register() -> None:
    """Wrap the functions of peft and diffusers, now or as soon as they are imported."""
    when_imported("peft.tuners.lora.model", _choose_layers)
    when_imported("peft.tuners.tuners_utils", _check_adapters)
    when_imported("diffusers.loaders.peft", _fuse_and_save_models)
    when_imported("diffusers.loaders.lora_base", _refuse_fusing_of_pipelines)
    when_imported("diffusers.loaders.lora_pipeline", _read_widths_of_flux)


def _choose_layers(peft: ModuleType) -> None:
    original = peft.LoraModel._create_new_module

    @wraps(original)
    def create(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        from stepquant.lora.peft_layers import QUANTIZED, lora_on  # imports peft

        if isinstance(target, QUANTIZED):
            return lora_on(target, adapter_name, config=lora_config, **kwargs)
        return original(lora_config, adapter_name, target, **kwargs)

    peft.LoraModel._create_new_module = staticmethod(create)


def _check_adapters(peft: ModuleType) -> None:
    original = peft.BaseTuner.inject_adapter

    @wraps(original)
    def inject(tuner: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        from stepquant.lora.peft_checks import check_adapter, quantized_layers

        if quantized_layers(model):
            check_adapter(tuner, model, adapter_name, kwargs.get("state_dict"))
        return original(tuner, model, adapter_name, *args, **kwargs)

    peft.BaseTuner.inject_adapter = inject


def _fuse_and_save_models(loaders: ModuleType) -> None:
    fuse_model, save_adapter = (
        loaders.PeftAdapterMixin.fuse_lora,
        loaders.PeftAdapterMixin.save_lora_adapter,
    )

    @wraps(fuse_model)
    def fuse(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not loaders.USE_PEFT_BACKEND:  # diffusers' own error says so
            return fuse_model(model, *args, **kwargs)
        from stepquant.lora.peft_checks import check_not_fused

        check_not_fused(model)
        return fuse_model(model, *args, **kwargs)

    @wraps(save_adapter)
    def save(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not loaders.USE_PEFT_BACKEND:
            return save_adapter(model, *args, **kwargs)
        from stepquant.lora.peft_checks import quantized_layers
        from stepquant.lora.peft_saving import Uncast

        return save_adapter(Uncast(model) if quantized_layers(model) else model, *args, **kwargs)

    loaders.PeftAdapterMixin.fuse_lora = fuse
    loaders.PeftAdapterMixin.save_lora_adapter = save


def _refuse_fusing_of_pipelines(loaders: ModuleType) -> None:
    original = loaders.LoraBaseMixin.fuse_lora

    @wraps(original)
    def fuse(pipeline: Any, components: Any = (), *args: Any, **kwargs: Any) -> Any:
        if not loaders.USE_PEFT_BACKEND:
            return original(pipeline, components, *args, **kwargs)
        from stepquant.lora.peft_checks import check_not_fused

        for name in [components] if isinstance(components, str) else components:
            model = getattr(pipeline, name, None)
            if model is not None:
                check_not_fused(model)
        return original(pipeline, components, *args, **kwargs)

    loaders.LoraBaseMixin.fuse_lora = fuse


def _read_widths_of_flux(loaders: ModuleType) -> None:
    """Leave quantized layers out where Flux's loader reads widths from the shapes of weights."""
    owner = loaders.FluxLoraLoaderMixin
    if not hasattr(owner, "_maybe_expand_transformer_param_shape_or_error_"):
        return  # a release of diffusers that reads no widths
    widen_model = owner._maybe_expand_transformer_param_shape_or_error_.__func__
    widen_lora = owner._maybe_expand_lora_state_dict.__func__

    @wraps(widen_model)
    def model_for(
        cls: Any, transformer: Any, lora_state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        from stepquant.lora.flux_widths import split

        others, _ = split(transformer, lora_state_dict or {})
        return widen_model(cls, transformer, others, *args, **kwargs)

    @wraps(widen_lora)
    def lora_for(cls: Any, transformer: Any, lora_state_dict: Any) -> Any:
        from stepquant.lora.flux_widths import split, widened

        others, own = split(transformer, lora_state_dict)
        return {**widen_lora(cls, transformer, others), **widened(transformer, own)}

    owner._maybe_expand_transformer_param_shape_or_error_ = classmethod(model_for)
    owner._maybe_expand_lora_state_dict = classmethod(lora_for)
