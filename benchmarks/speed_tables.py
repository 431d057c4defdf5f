"""Tables of speed, size and memory."""

from __future__ import annotations

from collections.abc import Sequence

from table_registry import Record, markdown, read, table

ENGINES = {
    "best bf16": "torch bf16, eager or compiled",
    "float32": "torch float32, eager",
    "bf16": "torch bf16, eager",
    "bf16 compiled": "torch bf16, `torch.compile`",
    "openvino float32": "OpenVINO float32",
    "openvino bf16": "OpenVINO bf16",
    "openvino nncf int8": "OpenVINO + NNCF INT8",
    "openvino nncf int8 bf16": "OpenVINO + NNCF INT8, bf16 between",
    "stepquant w8a8": "stepquant W8A8",
    "stepquant w4a4": "stepquant W4A4",
    "stepquant w8a8 call by call": "stepquant W8A8, calls not recorded",
    "stepquant w8a8 by layer": "stepquant W8A8, layer by layer on oneDNN",
    "stepquant w8a8 openvino": "stepquant W8A8 on OpenVINO",
    "stepquant w8a8 openvino bf16": "stepquant W8A8 on OpenVINO, bf16 between",
}
MODELS = {
    "embedded": "DDPM, 1.8 M",
    "paper": "DDPM, 35.7 M",
    "sd15": "SD 1.5 UNet",
    "dit-xl": "DiT-XL/2",
}
# The README's columns: among them two where the rival wins.
HEADLINE = (("embedded", 1), ("paper", 1), ("paper", 16), ("sd15", 2), ("dit-xl", 2))
HEADLINE_ENGINES = (
    "best bf16",
    "openvino nncf int8",
    "openvino nncf int8 bf16",
    "stepquant w8a8",
    "stepquant w4a4",
)


def timing(model: str, batch: int) -> dict[str, Record]:
    """Engine -> row of one cell of `cpu_runtime.py`."""
    (cell,) = (
        cell
        for cell in read("cpu_runtime.json")["timings"]
        if (cell["model"], cell["batch"]) == (model, batch)
    )
    rows = {row["engine"]: row for row in cell["rows"]}
    both = [rows[name] for name in ("bf16", "bf16 compiled") if name in rows]
    return {**rows, "best bf16": max(both, key=lambda row: row["times_faster_than_float32"])}


def file_sizes() -> dict[str, float]:
    """Engine -> MB of the 35.7 M DDPM's weights on disk."""
    cells = read("cpu_runtime.json")["footprints"]
    sizes = {cell["engines"][0]: cell["file_mb"] for cell in cells if cell["model"] == "paper"}
    sizes["best bf16"] = sizes["float32"] / 2
    sizes["openvino nncf int8 bf16"] = sizes["openvino nncf int8"]
    return sizes


@table
def headline_speed() -> str:
    """Times as fast as eager float32, the best of each column bold, and times smaller."""
    columns = []
    for model, batch in HEADLINE:
        found = timing(model, batch)
        values = {
            name: found[name]["times_faster_than_float32"]
            for name in HEADLINE_ENGINES
            if name in found
        }
        best = max(values.values())
        columns.append(
            {
                name: f"**{value:.1f}**" if value == best else f"{value:.1f}"
                for name, value in values.items()
            }
        )
    sizes = file_sizes()
    rows = [
        [
            ENGINES[name],
            *[column.get(name, "") for column in columns],
            f"{sizes['float32'] / sizes[name]:.1f}",
        ]
        for name in HEADLINE_ENGINES
    ]
    heads = [f"{MODELS[model]}, batch {batch}" for model, batch in HEADLINE]
    return markdown(["Times as fast as float32", *heads, "Times smaller file"], rows)


def speed_table(cells: Sequence[tuple[str, int]]) -> str:
    """Milliseconds and times as fast as eager float32, a row for each engine."""
    found = [timing(*cell) for cell in cells]
    rows = []
    for name, words in ENGINES.items():
        if name == "best bf16":
            continue
        values = [
            f"{rows_[name]['median_ms']:.1f} ms, {rows_[name]['times_faster_than_float32']:.2f}"
            if name in rows_
            else ""
            for rows_ in found
        ]
        if any(values):
            rows.append([words, *values])
    return markdown(["", *[f"{MODELS[model]}, batch {batch}" for model, batch in cells]], rows)


@table
def ddpm_speed() -> str:
    """Every engine on the 35.7 M DDPM."""
    return speed_table([("paper", 1), ("paper", 4), ("paper", 16)])


@table
def embedded_speed() -> str:
    """Every engine on the embedded model."""
    return speed_table([("embedded", 1), ("embedded", 4), ("embedded", 16)])


@table
def large_speed() -> str:
    """Every engine on the two large models."""
    return speed_table([("sd15", 2), ("dit-xl", 2)])


@table
def memory_modes() -> str:
    """What weights take in memory in both modes, and what the small one costs in time."""
    rows = []
    for cell in read("cpu_runtime.json")["footprints"]:
        modes = cell["memory_modes"]
        if modes is None:
            continue
        name = cell["engines"][0].removeprefix("stepquant ").upper()
        fast, low = modes["fast"], modes["low"]
        values = [f"{mode['times_smaller']:.2f}" for mode in (fast, low)]
        longer = f"{low['median_ms'] / fast['median_ms']:.1f} times as long"
        rows.append([f"{MODELS[cell['model']]}, {name}", *values, longer])
    head = ["Times smaller than float32", "`fast`", "`low`", "A call in `low` takes"]
    return markdown(head, rows)


@table
def footprints() -> str:
    """File, resident memory and load time of each engine at batch 1."""
    rows = []
    for cell in read("cpu_runtime.json")["footprints"]:
        keys = ("file_mb", "resident_model_mb", "anonymous_model_mb")
        name = f"{MODELS[cell['model']]}, {ENGINES[cell['engines'][0]]}"
        values = [f"{cell[key]:.1f} MB" for key in keys]
        rows.append([name, *values, f"{cell['load_seconds']:.1f} s"])
    return markdown(["", "File", "Resident", "Of it no mapped file", "Loads in"], rows)


@table
def large_models() -> str:
    """Peak memory and time of large models."""
    names = {
        "sd15-calibrate": "SD 1.5 UNet, `dilatequant` W4A8, 64 x 64 latents",
        "sdxl-pack": "SDXL UNet, weight-only W4",
        "flux-pack": "Flux transformer, weight-only W4",
    }
    jobs = {job["job"]: job for job in read("large_models.json")}
    rows = []
    for name, words in names.items():
        job, record = jobs[name], jobs[name]["record"]
        predicted = record.get("predicted_peak_memory_mb")
        rows.append(
            [
                words,
                f"{job['parameters'] / 1e9:.2f} B",
                f"{job['peak_gib']:.2f} GiB",
                f"{predicted * 1e6 / 2**30:.2f} GiB" if predicted else "",
                f"{record['seconds']:.0f} s",
                f"{record['times_smaller']:.2f}",
            ]
        )
    head = ["", "Parameters", "Peak memory", "Predicted", "Time", "Times smaller than float32"]
    return markdown(head, rows)


@table
def sizes() -> str:
    """Files of the published CIFAR-10 DDPM architecture."""
    rows = []
    for file in ("size_and_speed.json", "mixed_bits_size.json"):
        for name, size in read(file)["sizes"].items():
            megabytes = f"{size['checkpoint_bytes'] / 1e6:.1f} MB"
            mean = f"{size['mean_weight_bits']:.2f}"
            rows.append([name.upper(), mean, megabytes, f"{size['times_smaller']:.2f}"])
    return markdown(["Bits", "Mean weight bits", "File", "Times smaller than float32"], rows)


@table
def operator_overhead() -> str:
    """Fused passes called directly and as operators, on the smaller of two images."""
    found = read("operator_overhead.json")["passes"]
    rows = [
        [each["name"], f"{each['direct_us']:.0f}", f"{each['operator_us']:.0f}"]
        for each in found[: len(found) // 2]
    ]
    return markdown(["Pass, channels x height x width", "Direct (µs)", "Operator (µs)"], rows)


@table
def operator_overhead_in_models() -> str:
    """Denoiser calls with all passes called directly, and as operators."""
    rows = []
    for each in read("operator_overhead.json")["models"]:
        times = [f"{each[key]:.1f} ms" for key in ("direct_ms", "operator_ms")]
        more = f"{each['overhead_percent']:.0f} %"
        rows.append([each["model"], str(sum(each["passes"].values())), *times, more])
    return markdown(["Model, W4A8", "Passes", "Direct", "Operators", "Longer by"], rows)


WAYS = {
    "call by call": "call by call",
    "kept memory": "call by call, the allocator keeps its memory",
    "compiled": "`torch.compile`",
    "exported": "`torch.export` and AOTInductor",
    "captured": "captured call",
}


CAPTURED_MODELS = {
    "embedded": "`builtin:fashion-ddpm`",
    "paper": "35.7 M DDPM",
    "sd15": "Stable Diffusion 1.5 UNet",
    "dit-xl": "DiT-XL/2",
}


@table
def captured_calls() -> str:
    """Five ways to call a packed denoiser."""
    rows = []
    for each in read("captured_calls.json")["rows"]:
        model = CAPTURED_MODELS[each["model"]]
        cells = [f"{model}, batch {each['batch']}", WAYS[each["way"]]]
        if "error" in each:
            rows.append([*cells, "-", "-", "-"])
            continue
        equal = "yes" if each["largest_difference"] == 0 else f"{each['largest_difference']:.0e}"
        setup = f"{each['setup_seconds']:.1f} s"
        rows.append([*cells, f"{each['milliseconds']:.1f} ms", setup, equal])
    head = ["Model, W8A8", "Way", "A call", "Until it is ready", "Same bits"]
    return markdown(head, rows)
