"""A packed denoiser that OpenVINO runs: `pipeline.unet = OpenVinoDenoiser(pipeline.unet)`."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from stepquant.engines.openvino_export import (
    DEFAULT,
    check_exportable,
    check_no_lora,
    export_denoiser,
    traced,
)
from stepquant.models.calling import (
    prediction_in,
    tensors_in,
    with_prediction,
    with_tensors,
)
from stepquant.models.stand_in import StandIn
from stepquant.quantizers.step_grid import StepContext, StepGrid
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.straight_through import wants_gradient
from stepquant.support.errors import StepQuantError

PRECISIONS = ("f32", "bf16", "f16")
PRECISION = "INFERENCE_PRECISION_HINT"
LOGGER = logging.getLogger(__name__)


def openvino_package() -> Any:
    """The package openvino; where it is not installed, the error says what to do."""
    try:
        import openvino  # not at the top: it is an extra, and takes a second
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            raise
        raise StepQuantError(
            "the backend openvino needs the package 'openvino', which is not installed: "
            'run `pip install "stepquant[openvino]"`'
        ) from error
    return openvino


class OpenVinoDenoiser(StandIn):
    """Takes the calls of a packed denoiser and hands them to OpenVINO.

    Compiled for the shapes and other arguments of the first call, and again for others. Codes and
    integer sums are those of the packed layers; what is float between them is OpenVINO's, so that
    results differ by float32's rounding. Every other attribute is that of `denoiser`, which stays
    as it is; changes to it after the first call are not seen. That call is traced: what its Python
    reads out of a tensor's values stays.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        device: str = "CPU",
        precision: str = "f32",
        cache: str | Path | None = None,
    ) -> None:
        """Checks everything, compiles nothing.

        Args:
            denoiser: With packed layers, in float32, on the CPU.
            device: OpenVINO's name of one: "CPU", "GPU", "NPU", "AUTO".
            precision: What is not integers is computed in it: "f32"; "bf16" or "f16" is faster
                where the device has it, and gives other numbers.
            cache: Folder in which OpenVINO keeps compiled models, so that another process need not
                compile again.

        Raises:
            StepQuantError: openvino is not installed or has no such device, or the denoiser has
                something that it cannot run as the packed layers do.
        """
        openvino = openvino_package()
        if precision not in PRECISIONS:
            raise StepQuantError(
                f"the precision of the backend openvino is '{precision}': expected one of "
                f"{', '.join(PRECISIONS)}"
            )
        core = openvino.Core()
        found = core.available_devices
        kinds = {name.partition(".")[0] for name in found} | {"AUTO"}
        if device not in found and device not in kinds:
            raise StepQuantError(
                f"OpenVINO has no device '{device}' on this machine: expected one of "
                f"{', '.join(sorted(kinds))}"
            )
        check_exportable(denoiser, device)
        super().__init__(denoiser)
        self.core, self.target, self.precision = core, device, precision
        self.cache = None if cache is None else str(cache)
        self.grid: StepGrid = next(
            m for m in denoiser.modules() if isinstance(m, IntegerLayer)
        ).context.grid
        self._compiled: dict[Any, _Compiled] = {}

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = self._by_name(args, kwargs)
        if arguments.get("timestep") is None:
            raise StepQuantError(
                "the denoiser was called without a timestep: expected one for the batch or one "
                "for each sample; the scales of a quantized model depend on it"
            )
        arguments["timestep"] = torch.as_tensor(arguments["timestep"])
        check_no_lora(self.denoiser)
        if wants_gradient(*tensors_in(arguments)):
            raise StepQuantError(
                f"{type(self.denoiser).__name__} got a tensor that requires a gradient: "
                "expected none for the backend openvino, which gives numbers only; call the "
                "denoiser itself, or under torch.no_grad()"
            )
        tensors = [tensor.detach() for tensor in tensors_in(arguments)]
        self._check(arguments, tensors)
        context = StepContext(self.grid)
        context.set_timestep(arguments["timestep"].cpu())
        tensors = [context.rows, *tensors]
        key = (description(arguments), context.rows.shape)
        if key not in self._compiled:
            self._compiled[key] = self._compile(arguments, tensors)
        return self._compiled[key].run(tensors)

    def _check(self, arguments: dict[str, Any], tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor.dtype in (torch.float16, torch.bfloat16) or tensor.device.type != "cpu":
                raise StepQuantError(
                    f"{type(self.denoiser).__name__} was called with a tensor in {tensor.dtype} on "
                    f"{tensor.device}: expected float32 on the CPU for the backend openvino, whose "
                    "own device and precision are options"
                )
        for name, value in arguments.items():
            for leaf in tree_leaves(value):
                if not isinstance(leaf, Tensor | bool | int | float | str | None):
                    raise StepQuantError(
                        f"the denoiser's argument '{name}' holds a {type(leaf).__name__}: expected "
                        "tensors, numbers, words or None for the backend openvino"
                    )

    @torch.no_grad()
    def _compile(self, arguments: dict[str, Any], tensors: list[Tensor]) -> _Compiled:
        exported, context = export_denoiser(self.denoiser, self.target)
        call = _Call(exported, context, arguments)
        template = call.output(*tensors)  # also finds the constants of these shapes
        if len(tensors_in(template)) > 1:
            raise StepQuantError(
                f"{type(self.denoiser).__name__} returned {len(tensors_in(template))} tensors: "
                "expected the prediction alone for the backend openvino"
            )
        config = self._config()
        try:
            compiled = self.core.compile_model(traced(call, tensors), self.target, config)
        except Exception as error:  # of many kinds, with pages of text
            raise StepQuantError(
                f"OpenVINO does not compile {type(self.denoiser).__name__} for its {self.target} "
                f"({_reason(error)}): expected operators that it knows; {DEFAULT}"
            ) from error
        self._check_precision(compiled)
        LOGGER.info(
            "compiled %s for %s on OpenVINO's %s: %s",
            type(self.denoiser).__name__,
            " and ".join(str(tuple(tensor.shape)) for tensor in tensors[1:]),
            self.target,
            kernel_counts(compiled),
        )
        return _Compiled(compiled, template, self.denoiser)

    def _config(self) -> dict[str, Any]:
        # AUTO does not list the second, but hands it on.
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", PRECISION: self.precision}
        known = set(self.core.get_property(self.target, "SUPPORTED_PROPERTIES"))
        if "DYNAMIC_QUANTIZATION_GROUP_SIZE" in known:
            config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0  # nothing is rounded that we do not round
        if self.target == "CPU":
            config["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        if self.cache is not None:
            config["CACHE_DIR"] = self.cache
        return config

    def _check_precision(self, compiled: Any) -> None:
        """An error where the device computes in another precision than it was asked for."""
        if PRECISION not in compiled.get_property("SUPPORTED_PROPERTIES"):
            return
        found = compiled.get_property(PRECISION).to_string()
        if found != self.precision:
            raise StepQuantError(
                f"OpenVINO's {self.target} computes in {found} where '{self.precision}' was asked "
                f"for: expected the same; ask for precision '{found}', which gives other numbers"
            )

    def kernels(self) -> dict[str, int]:
        """Convolutions and matmuls by OpenVINO's kernel, of the model that was compiled last."""
        if not self._compiled:
            return {}
        return kernel_counts(list(self._compiled.values())[-1].model)


def kernel_counts(compiled: Any) -> dict[str, int]:
    """Convolutions and matmuls of a compiled model, by the kernel's name."""
    counts: Counter[str] = Counter()
    for operation in compiled.get_runtime_model().get_ops():
        info = operation.get_rt_info()
        kind = info["layerType"].astype(str) if "layerType" in info else ""
        if kind.lower() in ("convolution", "fullyconnected", "matmul", "fully_connected", "gemm"):
            counts[info["primitiveType"].astype(str)] += 1
    return dict(sorted(counts.items()))


@dataclass
class _Compiled:
    model: Any
    template: Any  # what the denoiser returned, for the kind of it
    denoiser: nn.Module

    def run(self, tensors: list[Tensor]) -> Any:
        """What the denoiser returns for `tensors`, the rows first."""
        arrays = [tensor.contiguous().numpy() for tensor in tensors]
        (found,) = self.model(arrays, share_inputs=True).values()
        prediction = prediction_in(self.template, self.denoiser)
        return with_prediction(self.template, torch.from_numpy(found).to(prediction.dtype))


class _Call(nn.Module):
    """The denoiser's call with the tensors of `arguments` as arguments one after another."""

    def __init__(self, exported: nn.Module, context: StepContext, arguments: dict[str, Any]):
        super().__init__()
        self.exported, self.context, self.arguments = exported, context, arguments

    def output(self, rows: Tensor, *tensors: Tensor) -> Any:
        """What the denoiser returns."""
        self.context.rows = rows
        return self.exported(**with_tensors(self.arguments, iter(tensors)))

    def forward(self, rows: Tensor, *tensors: Tensor) -> Tensor:
        """The prediction."""
        return prediction_in(self.output(rows, *tensors), self.exported)


def _reason(error: Exception) -> str:
    """The line of OpenVINO's message that tells most, or the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "No conversion rule" in line or "::" in line]
    return (telling or lines or [type(error).__name__])[-1][:200]


def description(value: Any) -> str:
    """What decides the graph of a call: all but the numbers in its tensors."""
    described = tree_map_only(Tensor, lambda each: f"{each.dtype} {tuple(each.shape)}", value)
    return repr(described)
