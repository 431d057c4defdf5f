"""Quantizer class through which diffusers saves and loads stepquant checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from stepquant.checkpoint import validate
from stepquant.checkpoint.architecture import check_architecture
from stepquant.checkpoint.checksum import (
    CHECKSUM_NAME,
    FileChecksum,
    checksum,
    checksum_tensor,
    tensor_line,
)
from stepquant.checkpoint.config import StepQuantConfig
from stepquant.checkpoint.frozen_quantizer import FrozenQuantizer
from stepquant.checkpoint.quantized_model import adapt_methods
from stepquant.models.attention_processor import ProductsProcessor
from stepquant.models.input_bypass import SLOPES_NAME, InputBypass, bypass_of, detach_bypass
from stepquant.models.non_finite import NonFiniteSamples
from stepquant.models.rewriting import rewrite, without_rewritten
from stepquant.models.surgery import replace_modules
from stepquant.quantizers import StepContext, StepGrid
from stepquant.runtime.blocks import use_fast_blocks, use_plain_blocks
from stepquant.runtime.layers.adapters import check_no_adapter_tensors
from stepquant.runtime.layers.dtype_marker import place_markers
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.layer_tensors import Reader, not_read
from stepquant.support.errors import StepQuantError


class StepQuantQuantizer(FrozenQuantizer):
    """Loads, checks and saves packed denoisers inside `from_pretrained` and `save_pretrained`.

    While it loads a model, diffusers calls in this order

    1. `maybe_update_loaded_keys`,
    2. `preprocess_model`,
    3. for each file `maybe_update_state_dict`, then for each of its tensors
       `check_if_quantized_param` and `create_quantized_param`,
    4. `postprocess_model`.
    """

    requires_calibration = True

    quantization_config: StepQuantConfig  # type: ignore[assignment]

    def __init__(self, quantization_config: StepQuantConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise StepQuantError(
                "StepQuantConfig was given for a float model: expected a quantized one, because "
                "recipes are calibrated with the sampler; run `stepquant quantize MODEL --recipe "
                "NAME --out DIR` and load DIR, or pass WeightOnlyConfig or DynamicConfig, which "
                "need no calibration"
            )
        super().__init__(quantization_config, **kwargs)
        self._loaded_keys: list[str] = []
        self._model: nn.Module | None = None  # only while it is loaded
        self._context: StepContext | None = None
        self._checksum = FileChecksum()
        self.saved_names: frozenset[str] | None = None
        """The tensors that a load of the model expects, once that is known."""
        self.why_not_saved: str | None = None
        """Why a load could not build the model again, or None."""

    def update_device_map(self, device_map: Any) -> Any:
        """Return `device_map`, with a place for the tensors that the float model does not have."""
        if not isinstance(device_map, dict) or not device_map or "" in device_map:
            return device_map
        own = [validate.STEP_GRID_NAME]
        if self.quantization_config.input_error_bypass is not None:
            own.append(SLOPES_NAME)
        return {**dict.fromkeys(own, next(iter(device_map.values()))), **device_map}

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        """Refuse pickles, keep the names for the check, and hide the checksum from diffusers.

        Raises:
            StepQuantError: a file is not a safetensors file, or has a step grid of another length.
        """
        for file in checkpoint_files:
            if not str(file).endswith(".safetensors"):
                raise StepQuantError(
                    f"the checkpoint file '{file}' is not a safetensors file: pickle files are "
                    "refused, so save the model with safe_serialization=True"
                )
        validate.check_grid_length(checkpoint_files, self.quantization_config.steps)
        self._loaded_keys = list(loaded_keys)
        return [key for key in loaded_keys if key != CHECKSUM_NAME]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Replace the layers that the config names with packed layers on the meta device.

        Raises:
            StepQuantError: the model lacks such a layer or does not fit the config, or the
                checkpoint lacks a tensor or has one too many.
        """
        check_architecture(model, self.quantization_config.architecture)
        context = self._put_packed(model)
        validate.check_names([*model.state_dict(), CHECKSUM_NAME], self._loaded_keys)
        self._owned = validate.packed_names(model)
        self._model, self._context = model, context

    def _put_packed(self, model: Any) -> StepContext:
        """Replace the layers that the config names, and return the step context that they share."""
        config = self.quantization_config
        rewrite(model, set(config.rewritten_layers))
        modules = dict(model.named_modules())
        unknown = sorted((set(config.layers) | set(config.attention)) - set(modules))
        if unknown:
            raise StepQuantError(
                f"the quantization config names the layer '{unknown[0]}', which "
                f"{type(model).__name__} does not have: expected names of its linear, conv and "
                "attention layers; the config belongs to another model"
            )
        # Row numbers are placeholders for the timesteps until `step_grid` is loaded.
        context = StepContext(StepGrid(torch.arange(config.steps)))
        replace_modules(
            model,
            lambda name, module: (
                config.layers[name].packed_in_place_of(name, module, context)
                if name in config.layers
                else None
            ),
        )
        for name, entry in config.attention.items():
            entry.put_into(name, modules[name], context)
        model.register_buffer(validate.STEP_GRID_NAME, torch.empty(config.steps, device="meta"))
        context.attach(model)
        if config.input_error_bypass is not None:
            slopes = torch.empty(config.steps, device="meta")
            InputBypass(config.input_error_bypass).attach(model, slopes)
        return context

    def _loadable(self, built: Any) -> dict[str, Tensor]:
        self._put_packed(built)
        return built.state_dict()

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Check each tensor as it is in the file, before diffusers casts it.

        Raises:
            StepQuantError: a tensor has another dtype, shape or range of values than expected.
        """
        assert self._model is not None
        # A shard may hold tensors that the index of shards does not name.
        validate.check_names(self._loaded_keys, {*self._loaded_keys, *state_dict})
        for name, tensor in state_dict.items():
            if name != CHECKSUM_NAME:
                validate.check_tensor(name, tensor, self._model)
            self._checksum.take(name, tensor)
        return state_dict

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: str | int | torch.device,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put the file's own tensor in place; `param_value` is already cast to `torch_dtype`."""
        layer_name, _, key = param_name.rpartition(".")
        tensor = state_dict[param_name].contiguous().to(target_device)
        model.get_submodule(layer_name).register_buffer(key, tensor)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Verify the checksum, set the loaded step grid, and enable the fast blocks.

        Raises:
            StepQuantError: a tensor was not loaded as it is in the file, or the checksum differs.
        """
        for name in sorted(self._owned):
            tensor = model.get_buffer(name)
            if tensor.is_meta or tensor.dtype not in (torch.float32, torch.uint8):
                raise StepQuantError(
                    f"tensor '{name}' was loaded as {tensor.dtype} on {tensor.device}: expected it "
                    "unchanged from the file; load without offload_folder and offload_state_dict"
                )
        validate.check_channel_bits(model)
        self._checksum.check(self.quantization_config.layers_json(), validate.REMEDY)
        leave_files(model)
        assert self._context is not None
        self._context.grid = StepGrid(model.get_buffer(validate.STEP_GRID_NAME))
        bypass = bypass_of(model)
        if bypass is not None:
            bypass.read_slopes(model)
        NonFiniteSamples.attach(model)
        use_fast_blocks(model)
        model.requires_grad_(False)  # as after quantize: calls follow gradients where asked to
        place_markers(model)
        adapt_methods(model, other_dtypes=False)
        self.saved_names, self.saved_model = frozenset(model.state_dict()), model
        self._loaded_keys, self._checksum, self._owned = [], FileChecksum(), set()
        self._model = self._context = None

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors that `save_pretrained` writes, with the checksum, and no metadata.

        Raises:
            StepQuantError: `safe_serialization` is False, or a load would refuse the tensors.
        """
        if not safe_serialization:
            raise StepQuantError(
                "save_pretrained was called with safe_serialization=False: pickle files are "
                "refused, so leave it at True"
            )
        self.check_saved(state_dict)
        lines = [tensor_line(name, tensor) for name, tensor in state_dict.items()]
        digest = checksum(self.quantization_config.layers_json(), lines)
        return {**state_dict, CHECKSUM_NAME: checksum_tensor(digest)}, {}

    def check_saved(self, names: Iterable[str]) -> None:
        """Check that a load would take tensors of these `names`.

        Raises:
            StepQuantError: the model has lost or gained tensors, an adapter of peft, or a module
                that its config does not describe.
        """
        if self.why_not_saved is not None:
            raise StepQuantError(self.why_not_saved)
        found = set(names)
        check_no_adapter_tensors(found)
        if self.saved_names is None:
            return
        for changed, what in (
            (self.saved_names - found, "has lost the tensor"),
            (found - self.saved_names, "has gained the tensor"),
        ):
            if changed:
                raise StepQuantError(
                    f"the quantized model {what} '{min(changed)}' since it was quantized or "
                    "loaded: expected the same tensors, because a load refuses others; save the "
                    "model as it was"
                )

    def _dequantize(self, model: Any) -> Any:
        """Replace packed layers with float layers that hold the dequantized weights.

        Activations are no longer quantized.

        Raises:
            StepQuantError: a layer has a tensor that no float layer can use.
        """
        dtype = model.dtype
        for name, layer in validate.packed_layers(model).items():
            unread = not_read(layer.present(), Reader.DEQUANTIZED)
            if unread:
                raise StepQuantError(
                    f"the layer '{name}' has the tensor '{unread[0]}': expected a layer without "
                    "it, because float layers cannot compute with it; keep the quantized model"
                )
        replace_modules(
            model,
            lambda _, module: (
                float_layer(module, dtype) if isinstance(module, IntegerLayer) else None
            ),
        )
        without_rewritten(model)
        use_plain_blocks(model)  # whose attention lets go of its products
        for module in model.modules():
            if isinstance(getattr(module, "processor", None), ProductsProcessor):
                module.set_processor(AttnProcessor2_0())
        delattr(model, validate.STEP_GRID_NAME)
        detach_bypass(model)
        NonFiniteSamples.detach(model)
        return model


def leave_files(model: nn.Module) -> None:
    """Copy the CPU tensors of `model`, which may be parts of a memory-mapped file.

    A single tensor in use keeps all pages of the file in memory. Among them are those of the packed
    weights, which layers no longer need once they have laid their weights out.
    """
    copies: dict[int, Tensor] = {}
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "cpu":
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.clone()
                module._buffers[key] = copies[id(buffer)]


def float_layer(layer: IntegerLayer, dtype: torch.dtype) -> nn.Linear | nn.Conv2d:
    """Return `nn.Linear` or `nn.Conv2d` in `dtype` with the dequantized weight of `layer`.

    A scale per in-channel is folded into the weight.
    """
    spec, weight, has_bias = layer.spec, layer.float_weight(), layer.bias is not None
    device: Any = layer.weight_scale.device
    channel_scale: Any = layer.act_channel_scale
    new: Any
    if spec.kind == "linear":
        new = nn.Linear(spec.in_channels, spec.out_channels, has_bias, device, dtype)
    else:
        new = nn.Conv2d(
            spec.in_channels,
            spec.out_channels,
            spec.kernel_size,
            spec.stride,
            spec.padding,
            spec.dilation,
            bias=has_bias,
            device=device,
            dtype=dtype,
        )
    if channel_scale is not None:  # w (x / d) = (w / d) x
        weight = weight / channel_scale.cpu().view(1, -1, *(1,) * (weight.dim() - 2))
    with torch.no_grad():
        new.weight.copy_(weight)
        if has_bias:
            new.bias.copy_(layer.bias)
    return new
