"""Running a packed denoiser on OpenVINO: `pipeline.unet = OpenVinoDenoiser(pipeline.unet)`."""

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
    check_no_lora_branch,
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
from stepquant.support.errors import StepQuantError

PRECISIONS = ("f32", "bf16", "f16")
PRECISION = "INFERENCE_PRECISION_HINT"
LOGGER = logging.getLogger(__name__)


def openvino_package() -> Any:
    """Return the package openvino.

    Raises:
        StepQuantError: it is not installed; the message gives the install command.
    """
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
    """Runs the calls of a packed denoiser on OpenVINO.

    The first call compiles a model for its shapes and other arguments; calls with others compile
    another one. Codes and integer sums are those of the packed layers. OpenVINO computes the float
    operations between them, so results differ by float32 rounding.

    All other attributes are those of `denoiser`, which stays unchanged. Compilation traces a call,
    so later changes of `denoiser` have no effect, and values that its Python code reads from
    tensors become constants.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        device: str = "CPU",
        precision: str = "f32",
        cache: str | Path | None = None,
    ) -> None:
        """Check all arguments; the first call compiles.

        Args:
            denoiser: a denoiser with packed layers, in float32 on the CPU.
            device: OpenVINO's name of a device: "CPU", "GPU", "NPU" or "AUTO".
            precision: precision of the float operations, "f32", "bf16" or "f16". The last two are
                faster on devices that support them, and change the results.
            cache: folder for compiled models, which other processes can then load.

        Raises:
            StepQuantError: openvino is not installed or lacks the device, or the denoiser has parts
                that OpenVINO cannot run like the packed layers.
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
        check_no_lora_branch(self.denoiser)
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
                    f"{tensor.device}: expected float32 on the CPU; choose OpenVINO's own device "
                    "and precision with the options of the backend openvino"
                )
        for name, value in arguments.items():
            for leaf in tree_leaves(value):
                if not isinstance(leaf, Tensor | bool | int | float | str | None):
                    raise StepQuantError(
                        f"the denoiser's argument '{name}' holds a {type(leaf).__name__}: expected "
                        "tensors, numbers, strings or None for the backend openvino"
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
        except Exception as error:  # OpenVINO raises many types, with long texts
            raise StepQuantError(
                f"OpenVINO cannot compile {type(self.denoiser).__name__} for its {self.target} "
                f"({_reason(error)}): expected operators that it supports; {DEFAULT}"
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
        # The device AUTO does not list the precision as supported, but passes it on.
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", PRECISION: self.precision}
        known = set(self.core.get_property(self.target, "SUPPORTED_PROPERTIES"))
        if "DYNAMIC_QUANTIZATION_GROUP_SIZE" in known:
            config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0  # no additional quantization
        if self.target == "CPU":
            config["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        if self.cache is not None:
            config["CACHE_DIR"] = self.cache
        return config

    def _check_precision(self, compiled: Any) -> None:
        """Check that the device computes in the requested precision.

        Raises:
            StepQuantError: it computes in another one.
        """
        if PRECISION not in compiled.get_property("SUPPORTED_PROPERTIES"):
            return
        found = compiled.get_property(PRECISION).to_string()
        if found != self.precision:
            raise StepQuantError(
                f"OpenVINO's {self.target} computes in {found} instead of the requested "
                f"'{self.precision}': expected the same; request precision '{found}', which "
                "changes the results"
            )

    def kernels(self) -> dict[str, int]:
        """Return the number of convolutions and matmuls by kernel in the last compiled model."""
        if not self._compiled:
            return {}
        return kernel_counts(list(self._compiled.values())[-1].model)


def kernel_counts(compiled: Any) -> dict[str, int]:
    """Return the number of convolutions and matmuls of a compiled model, by name of the kernel."""
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
    template: Any  # the denoiser's output, for its type
    denoiser: nn.Module

    def run(self, tensors: list[Tensor]) -> Any:
        """Return the denoiser's output for `tensors`, of which the first are the rows."""
        arrays = [tensor.contiguous().numpy() for tensor in tensors]
        (found,) = self.model(arrays, share_inputs=True).values()
        prediction = prediction_in(self.template, self.denoiser)
        return with_prediction(self.template, torch.from_numpy(found).to(prediction.dtype))


class _Call(nn.Module):
    """A call of the denoiser that takes the tensors in `arguments` as positional arguments."""

    def __init__(self, exported: nn.Module, context: StepContext, arguments: dict[str, Any]):
        super().__init__()
        self.exported, self.context, self.arguments = exported, context, arguments

    def output(self, rows: Tensor, *tensors: Tensor) -> Any:
        """Return the denoiser's output."""
        self.context.rows = rows
        return self.exported(**with_tensors(self.arguments, iter(tensors)))

    def forward(self, rows: Tensor, *tensors: Tensor) -> Tensor:
        """Return the prediction."""
        return prediction_in(self.output(rows, *tensors), self.exported)


def _reason(error: Exception) -> str:
    """Return the most informative line of OpenVINO's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "No conversion rule" in line or "::" in line]
    return (telling or lines or [type(error).__name__])[-1][:200]


def description(value: Any) -> str:
    """Describe the arguments that the graph of a call depends on: all but values of tensors."""
    described = tree_map_only(Tensor, lambda each: f"{each.dtype} {tuple(each.shape)}", value)
    return repr(described)
