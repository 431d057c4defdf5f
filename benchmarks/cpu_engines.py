"""The ways to run a denoiser on the CPU that `cpu_runtime.py` compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speed_files import IR, load_denoiser
from speed_models import Inputs, call
from stepquant.engines.backend import set_backend
from stepquant.engines.captured_calls import recorded
from stepquant.engines.openvino_denoiser import OpenVinoDenoiser
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.support.errors import StepQuantError

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Engine:
    """One way: the files it loads (`speed_files.FILES`) and how it runs them.

    `compiler`: the backend of `torch.compile`, None for eager torch. `precision`: OpenVINO's
    INFERENCE_PRECISION_HINT, None for torch; packed files then run on stepquant's own export to
    it. `backend`: of packed layers; other than "auto" they run one by one, without what blocks do
    for them. `replayed`: calls of packed layers on "auto" are recorded and replayed.
    """

    name: str
    files: str
    compiler: str | None = None
    precision: str | None = None
    backend: str = "auto"
    replayed: bool = True

    @property
    def compiles(self) -> bool:
        """Whether `torch.compile` is part of it, whose first call may take minutes."""
        return self.compiler is not None


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("float32", "float32"),
        Engine("float32 compiled", "float32", "inductor"),
        Engine("bf16", "bf16"),
        Engine("bf16 compiled", "bf16", "inductor"),
        Engine("stepquant w8a8", "w8a8"),
        Engine("stepquant w8a8 call by call", "w8a8", replayed=False),
        Engine("stepquant w8a8 compiled", "w8a8", "inductor"),
        Engine("stepquant w8a8 by layer", "w8a8", backend="onednn"),
        Engine("stepquant w8a8 openvino", "w8a8", precision="f32"),
        Engine("stepquant w8a8 openvino bf16", "w8a8", precision="bf16"),
        Engine("stepquant w4a4", "w4a4"),
        Engine("stepquant w4a4 compiled", "w4a4", "inductor"),
        Engine("stepquant w4a4 by layer", "w4a4", backend="onednn"),
        Engine("stepquant w4a4 openvino", "w4a4", precision="f32"),
        Engine("stepquant w4a4 openvino bf16", "w4a4", precision="bf16"),
        Engine("openvino float32", "openvino", precision="f32"),
        Engine("openvino bf16", "openvino", precision="bf16"),
        Engine("openvino nncf int8", "nncf-int8", precision="f32"),
        Engine("openvino nncf int8 bf16", "nncf-int8", precision="bf16"),
    )
}
IR_FILES = ("openvino", "nncf-int8")  # what OpenVINO itself reads
EAGER = "float32"  # what all are compared with
NNCF = ("openvino nncf int8", "openvino nncf int8 bf16")


def one_sentence(error: BaseException) -> str:
    """The first line of an error, with its class where that says more."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, StepQuantError) and lines:
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Loader:
    """Makes calls of engines on one input; torch modules are loaded once for all that run them."""

    def __init__(self, models: Path, inputs: Inputs) -> None:
        self.models, self.inputs = models, inputs
        self._modules: dict[tuple[str, str], nn.Module] = {}
        # Each module that is compiled is one more version of the same forward.
        torch._dynamo.config.recompile_limit = 64

    def load(self, engine: Engine) -> Call:
        """A call without arguments that gives the prediction `[B, C, H, W]`."""
        if not (self.models / engine.files).is_dir():
            raise StepQuantError(
                f"there is no folder '{self.models / engine.files}': expected what the engine "
                f"'{engine.name}' loads; making it has failed"
            )
        if engine.precision is not None and engine.files in IR_FILES:
            return self._openvino(engine)
        key = (engine.files, engine.backend)
        if key not in self._modules:
            self._modules[key] = load_denoiser(self.models / engine.files)
            set_backend(self._modules[key], engine.backend)
        module: Any = self._modules[key]
        if engine.precision is not None:
            module = OpenVinoDenoiser(module, precision=engine.precision)
        elif engine.replayed and engine.compiler is None and engine.backend == "auto":
            module = recorded(module)
        dtype = torch.bfloat16 if engine.files == "bf16" else torch.float32
        inputs = self.inputs.to(dtype)
        if engine.compiler is not None:
            module = torch.compile(module, backend=engine.compiler, dynamic=False)

        def run() -> Tensor:
            with torch.no_grad():
                return call(module, inputs)

        return run

    def module(self, engine: Engine) -> nn.Module | None:
        """The torch module that `engine` runs, if it does and was loaded."""
        if engine.precision is not None:
            return None
        return self._modules.get((engine.files, engine.backend))

    def layers(self, engine: Engine) -> dict[str, int]:
        """How many layer inputs run on which kernel, and how many layers are float; torch only."""
        counts: dict[str, int] = {}
        module = self._modules.get((engine.files, engine.backend))
        for layer in module.modules() if module is not None else ():
            if isinstance(layer, IntegerLayer):
                names = layer.kernel_names()
            else:
                names = ["float"] if isinstance(layer, nn.Linear | nn.Conv2d) else []
            for name in names:
                counts[name] = counts.get(name, 0) + 1
        return counts

    def _openvino(self, engine: Engine) -> Call:
        import openvino as ov

        core = ov.Core()
        model = core.read_model(self.models / engine.files / IR)
        tensors = self.inputs.tensors()
        model.reshape({index: list(tensor.shape) for index, tensor in enumerate(tensors)})
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": engine.precision,
            },
        )
        request = compiled.create_infer_request()
        for index, tensor in enumerate(tensors):
            request.set_input_tensor(index, ov.Tensor(tensor.numpy().copy()))
        output = request.get_output_tensor(0)

        def run() -> Tensor:
            request.infer()
            return torch.from_numpy(output.data)

        return run


def import_for(engine: Engine) -> None:
    """Load the libraries that `engine` runs on, so that its own memory can be told from theirs."""
    if engine.precision is not None:
        import openvino

        openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin
