"""What `cpu_runtime.py` loads its engines from: float, packed and exported models in folders.

Each is made once, in a process of its own, so that the process that times holds only what it
times.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from torch import nn

from cells import commit
from speed_models import (
    MODELS,
    Inputs,
    build_model,
    calibration_pipeline,
    call,
    random_inputs,
)
from stepquant.methods.recipe import parse_recipe
from stepquant.models.adapter import adapter_for
from stepquant.pipelines.resolved import denoiser_of
from stepquant.support.atomic import atomic_write
from stepquant.support.progress import Reporter
from stepquant.verbs.quantize import quantize

CALIBRATION_SAMPLES = 3  # of NNCF
STEPS, TABLE_STEPS, SMALL_TABLE_STEPS = 2, 100, 4
MADE = "made.json"
IR = "model.xml"


@dataclass(frozen=True)
class Subject:
    """A model with all that decides its weights and tables."""

    model: str
    small: bool = False
    layers: int | None = None
    tables: bool = False
    seed: int = 0

    @property
    def label(self) -> str:
        """See `SpeedModel.label`."""
        return MODELS[self.model].label(self.small, self.layers, self.tables)

    def settings(self, file: str) -> dict[str, Any]:
        """What the folder `file` has to have been made with."""
        return {"file": file, "model": self.label, "seed": self.seed}


def load_denoiser(folder: Path) -> nn.Module:
    """The diffusers model in `folder`, float or packed, in the dtype that its name says."""
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(diffusers, config["_class_name"])
    dtype = torch.bfloat16 if folder.name == "bf16" else torch.float32
    return kind.from_pretrained(folder, torch_dtype=dtype).eval().requires_grad_(False)


def read_config(models: Path) -> dict[str, Any]:
    """The config of the float model."""
    return json.loads((models / "float32" / "config.json").read_text())


def _float32(subject: Subject, models: Path, out: Path) -> None:
    del models
    model = build_model(subject.model, subject.small, subject.layers, subject.seed)
    model.save_pretrained(out)


def _bf16(subject: Subject, models: Path, out: Path) -> None:
    del subject
    load_denoiser(models / "float32").to(torch.bfloat16).save_pretrained(out)


def _packed(bits: int) -> Callable[[Subject, Path, Path], None]:
    def write(subject: Subject, models: Path, out: Path) -> None:
        model = load_denoiser(models / "float32")
        tables = subject.tables and subject.model == "paper"
        steps = (SMALL_TABLE_STEPS if subject.small else TABLE_STEPS) if tables else STEPS
        recipe = parse_recipe(
            {
                "name": "speed",
                "description": "ranges of few samples: good for size and speed",
                "scheme": {"weight_bits": bits, "activation_bits": bits},
                "calibration": {"trajectories": 1, "steps": steps, "scheduler": None, "batch": 1},
                "ranges": {"weights": "minmax", "activations": "minmax"},
                "steps": ["temporal_quantizer"] if tables else [],
            },
            "recipe",
        )
        result = quantize(
            calibration_pipeline(model),
            recipe,
            seed=subject.seed,
            adapter=adapter_for(model),
            reporter=Reporter(),
        )
        denoiser_of(result.pipeline).save_pretrained(out)

    return write


class Positional(nn.Module):
    """A denoiser that takes its conditions by position, which is what is exported."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The prediction."""
        conditions = {} if condition is None else {self.names[0]: condition}
        return call(self.model, Inputs(sample, timestep, conditions))


def _openvino(subject: Subject, models: Path, out: Path) -> None:
    import openvino as ov

    model = load_denoiser(models / "float32")
    # Two samples, so that nothing in the graph takes the batch for a constant of 1.
    inputs = random_inputs(model.config, 2, subject.seed)
    wrapped = Positional(model, list(inputs.conditions)).eval()
    with torch.no_grad(), warnings.catch_warnings():
        # Sizes other than the batch's are constants of the graph, as they are of the model.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        exported = ov.convert_model(wrapped, example_input=tuple(inputs.tensors()))
    ov.save_model(exported, out / IR, compress_to_fp16=False)


def _nncf(subject: Subject, models: Path, out: Path) -> None:
    import nncf
    import openvino as ov

    model = ov.Core().read_model(models / "openvino" / IR)
    config = read_config(models)
    samples = []
    for seed in range(CALIBRATION_SAMPLES):
        inputs = random_inputs(config, 1, subject.seed + seed)
        at = torch.full_like(inputs.timestep, (2 * seed + 1) * 1000 // (2 * CALIBRATION_SAMPLES))
        samples.append([t.numpy() for t in (inputs.sample, at, *inputs.conditions.values())])
    kind = nncf.ModelType.TRANSFORMER if MODELS[subject.model].transformer else None
    quantized = nncf.quantize(
        model, nncf.Dataset(samples), model_type=kind, subset_size=CALIBRATION_SAMPLES
    )
    ov.save_model(quantized, out / IR, compress_to_fp16=False)


# In the order in which they are made: each may read those before it.
FILES: dict[str, Callable[[Subject, Path, Path], None]] = {
    "float32": _float32,
    "bf16": _bf16,
    "w8a8": _packed(8),
    "w4a4": _packed(4),
    "openvino": _openvino,
    "nncf-int8": _nncf,
}
NEEDS = {"nncf-int8": ("openvino",)}  # besides float32, which all need


def needed(files: set[str]) -> list[str]:
    """`files` with all that they are made of, in the order in which they are made."""
    wanted = files | {"float32"}
    for file in files:
        wanted |= set(NEEDS.get(file, ()))
    return [file for file in FILES if file in wanted]


def is_made(subject: Subject, models: Path, file: str) -> bool:
    """Whether the folder is there; one of other settings is an error."""
    made = models / file / MADE
    if not made.exists():
        return False
    found, expected = json.loads(made.read_text()), subject.settings(file)
    for key, value in expected.items():
        if found.get(key) != value:
            raise SystemExit(
                f"'{made.parent}' was made with the {key} {found.get(key)!r}: expected {value!r}; "
                "delete it or choose another --cells folder"
            )
    return True


def make(subject: Subject, models: Path, file: str) -> None:
    """Write the folder `models/file`, whole or not at all."""
    if is_made(subject, models, file):
        return
    models.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    # A kill may leave one behind; the next start takes another name.
    with TemporaryDirectory(dir=models, prefix=f"{file}-") as scratch:
        partial = Path(scratch) / file
        partial.mkdir()
        FILES[file](subject, models, partial)
        made = {
            **subject.settings(file),
            "commit": commit(),
            "torch": version("torch"),
            "seconds": round(time.monotonic() - started, 1),
            "bytes": sum(f.stat().st_size for f in partial.rglob("*") if f.is_file()),
        }
        text = json.dumps(made, indent=1) + "\n"
        atomic_write(partial / MADE, lambda path: path.write_text(text))
        shutil.rmtree(models / file, ignore_errors=True)
        partial.rename(models / file)
