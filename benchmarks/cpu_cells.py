"""The measurements of `cpu_runtime.py`, each made in a process of its own."""

from __future__ import annotations

import gc
import os
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cells import machine
from cpu_engines import EAGER, ENGINES, NNCF, Call, Loader, import_for, one_sentence
from cpu_grid import Cell
from integer_peak import count_macs, integer_peak
from speed_files import load_denoiser, read_config
from speed_models import MODELS, Inputs, call, random_inputs
from stepquant.evaluation import measure_latency
from stepquant.runtime.layers.integer import is_packed
from stepquant.runtime.layers.resident import MODES, set_memory_mode, weight_bytes_resident
from stepquant.support.process_memory import peak_memory_mb
from stepquant.support.progress import Reporter

MODE_CALLS = 5


def surroundings(cell: Cell) -> dict[str, Any]:
    """Machine and versions, and what NNCF was told of the model."""
    found = machine()
    for name in ("openvino", "nncf"):
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            found["versions"][name] = None
    transformer = MODELS[cell.subject.model].transformer
    return {
        "machine": found,
        "load_average": os.getloadavg()[0],  # work beside this slows torch's threads most
        "nncf_model_type": "TRANSFORMER" if transformer else None,
        "what": MODELS[cell.subject.model].what,
    }


def relative_error(y: Tensor, reference: Tensor) -> float:
    """`|y - reference| / |reference|`, over all values."""
    difference = y.to(torch.float32) - reference
    return float(difference.norm() / reference.norm())


def arithmetic(models: Path, inputs: Inputs) -> tuple[int, dict[str, int]]:
    """The float model's parameters, and multiply-adds of one call by kind of layer."""
    model = load_denoiser(models / ENGINES[EAGER].files)
    with torch.no_grad():
        macs = count_macs(model, lambda: call(model, inputs))
    return sum(parameter.numel() for parameter in model.parameters()), macs


def timing_record(cell: Cell, models: Path, small: bool) -> dict[str, Any]:
    """All engines on one batch, in turns."""
    reporter = Reporter()
    inputs = random_inputs(read_config(models), cell.batch, cell.subject.seed)
    loader = Loader(models, inputs)
    parameters, macs = arithmetic(models, inputs)
    peaks = [integer_peak(small)]
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    reference: Tensor | None = None
    for name in cell.engines:
        reporter.line(f"  {cell.name}: {name}")
        started = time.perf_counter()
        try:
            run = loader.load(ENGINES[name])
            loaded = time.perf_counter()
            y = run()
        except Exception as error:  # one engine's failure is its row, and not the others'
            rows[name] = {"engine": name, "error": one_sentence(error)}
            reporter.line(f"  {cell.name}: {name} failed: {one_sentence(error)}")
            continue
        y = y.to(torch.float32).clone()
        reference = y if reference is None else reference
        calls[name] = run
        rows[name] = {
            "engine": name,
            "load_seconds": round(loaded - started, 3),
            "first_call_seconds": round(time.perf_counter() - loaded, 3),
            "relative_error": relative_error(y, reference),
            "finite": bool(torch.isfinite(y).all()),
            "layers": loader.layers(ENGINES[name]),
        }
    if EAGER not in calls:
        raise SystemExit(f"{cell.name}: {EAGER} failed, and all others are compared with it")
    settings = cell.settings
    timings = measure_latency(calls, settings["repeats"], settings["warmup"], settings["leads"])
    peaks.append(integer_peak(small))
    peak = {name: max(found[name] for found in peaks) for name in peaks[0]}
    total = sum(macs.values())
    for name, timing in timings.items():
        rows[name] |= {
            "median_ms": timing.median_ms,
            "p10_ms": timing.p10,
            "p90_ms": timing.p90,
            "times_faster_than_float32": timings[EAGER].median_ms / timing.median_ms,
            "gmacs_per_second": total / timing.median_ms / 1e6,
            "share_of_int8_peak": total / timing.median_ms / 1e6 / peak["best"],
        }
        for rival in NNCF:
            if rival in timings:
                key = "times_faster_than_" + rival.replace(" ", "_")
                rows[name][key] = timings[rival].median_ms / timing.median_ms
    return {
        **surroundings(cell),
        "parameters": parameters,
        "macs": macs,
        "int8_peak_gmacs_per_second": peak,
        "rows": list(rows.values()),
        "peak_memory_mb": round(peak_memory_mb(), 1),
    }


def resident_memory(status: Path = Path("/proc/self/status")) -> dict[str, float]:
    """Resident MB of 10^6 bytes of this process: all of it, and what of it is no mapped file."""
    found = {}
    for line in status.read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("VmRSS", "RssAnon"):
            found[key] = int(value.split()[0]) * 1024 / 1e6
    return found


def memory_modes(module: nn.Module, run: Call) -> dict[str, dict[str, float]]:
    """What the weights of a packed denoiser take in each memory mode, and how long a call is."""
    found = {}
    for mode in MODES:
        set_memory_mode(module, mode)
        run()
        seconds = []
        for _ in range(MODE_CALLS):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        weights = weight_bytes_resident(module)
        found[mode] = {
            "resident_bytes": weights.resident,
            "float32_bytes": weights.float32,
            "times_smaller": weights.times_smaller,
            "median_ms": statistics.median(seconds) * 1e3,
        }
    return found


def footprint_record(cell: Cell, models: Path, small: bool) -> dict[str, Any]:
    """One engine: seconds to load and of the first call, and the memory that both leave."""
    del small
    engine = ENGINES[cell.engines[0]]
    inputs = random_inputs(read_config(models), cell.batch, cell.subject.seed)
    import_for(engine)
    gc.collect()
    before = resident_memory()
    started = time.perf_counter()
    try:
        loader = Loader(models, inputs)
        run = loader.load(engine)
        loaded = time.perf_counter()
        run()
        called = time.perf_counter()
        run()
    except Exception as error:  # as in timing_record
        return {**surroundings(cell), "error": one_sentence(error)}
    again = time.perf_counter() - called
    gc.collect()
    after, peak = resident_memory(), round(peak_memory_mb(), 1)
    module = loader.module(engine)
    modes = memory_modes(module, run) if module is not None and is_packed(module) else None
    folder = models / engine.files
    weights = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".xml")]
    return {
        **surroundings(cell),
        "load_seconds": round(loaded - started, 3),
        "first_call_seconds": round(called - loaded, 3),
        "second_call_seconds": round(again, 4),
        "file_mb": round(sum(file.stat().st_size for file in weights) / 1e6, 1),
        "resident_before_mb": round(before["VmRSS"], 1),
        "resident_after_mb": round(after["VmRSS"], 1),
        "resident_model_mb": round(after["VmRSS"] - before["VmRSS"], 1),
        "anonymous_model_mb": round(after["RssAnon"] - before["RssAnon"], 1),
        "peak_memory_mb": peak,
        "memory_modes": modes,
    }
