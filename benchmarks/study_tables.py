"""Tables of scripts that answer one question each."""

from __future__ import annotations

from table_registry import markdown, read, table


@table
def input_bypass() -> str:
    """What rounding the sampler's sample costs."""
    words = {
        "input layer alone": "the first layer's input alone",
        "ranges": "all layers, ranges only",
        "ranges and bias_correction": "all layers, and `bias_correction`",
    }
    rows = []
    for row in read("input_bypass.jsonl"):
        alone = row["what"] == "input layer alone"
        rows.append(
            [
                words[row["what"]],
                "A8" if alone else row["bits"].upper(),
                "yes" if row["bypass"] else "no",
                f"{row['runaways']} of {row['num']}",
                f"{row['paired_psnr_db']:.1f} dB",
                f"{row['fd_fashion_to_float']:.2f}",
            ]
        )
    head = ["Quantized", "Bits", "Bypass", "Runs away", "PSNR", "fd_fashion to float's images"]
    return markdown(head, rows)


@table
def exposure_drift() -> str:
    """How far inputs drift from those that blocks were calibrated on."""
    means = read("exposure_drift.json")["mean"]
    names = ["trained on the float model's trajectories"]
    names += [f"+ {n} round{'s' if n > 1 else ''} on its own" for n in range(1, len(means))]
    rows = [[name, f"{mean:.3f}"] for name, mean in zip(names, means, strict=True)]
    return markdown(["Blocks", "Relative squared difference of inputs, mean"], rows)


@table
def temporal_training() -> str:
    """Batches over all steps beside one step after another."""
    rows = [
        [
            "all steps mixed" if arm["order"] == "mixed" else "one step after another",
            str(arm["samples_drawn_per_block"]),
            f"{arm['seconds']:.0f} s",
            f"{arm['mean_final_loss']:.4f}",
        ]
        for arm in read("temporal_training.json")["arms"]
    ]
    return markdown(["Batches", "Samples per block", "Time", "Mean held-out loss"], rows)


@table
def sampler_sensitivity() -> str:
    """White noise on the float model's predictions, with and without clipping."""
    rows = [
        [
            "yes" if row["clip_sample"] else "no",
            f"{row['relative_noise']:g}",
            f"{row['paired_psnr_db']:.1f} dB",
            f"{row['fd_fashion_to_float']:.2f}",
        ]
        for row in read("sampler_sensitivity.json")["rows"]
    ]
    head = ["`clip_sample`", "Noise power over prediction power", "PSNR"]
    return markdown([*head, "fd_fashion to float's images"], rows)


@table
def fidelity() -> str:
    """The packed model beside its simulation."""
    rows = []
    for row in read("fidelity.json")["rows"]:
        spread = row["psnr_difference_standard_error_db"]
        rows.append(
            [
                row["bits"].upper(),
                f"{row['worst_relative_difference']:.1e}",
                f"{row['psnr_packed_db']:.2f} dB",
                f"{row['psnr_simulated_db']:.2f} dB",
                f"{row['psnr_difference_db']:.2f} ± {spread:.2f} dB",
                "yes" if row["reference_kernels_bit_equal_to_simulation"] else "no",
                "yes" if row["reload_bit_equal"] else "no",
            ]
        )
    head = ["Bits", "Worst layer difference", "PSNR packed", "PSNR simulated", "Difference"]
    return markdown([*head, "Reference kernels bit-equal", "Reload bit-equal"], rows)


@table
def backend_quality() -> str:
    """Images of one checkpoint on every backend of the CPU."""
    names = {
        "onednn": "layer by layer on oneDNN",
        "auto": "our kernels, fused blocks",
        "openvino": "OpenVINO",
        "reference": "reference kernels",
    }
    rows = []
    for row in read("backend_quality.json")["rows"]:
        level = f"{row['paired_psnr_db']:.1f} dB"
        rows.append([row["bits"].upper(), names[row["backend"]], str(row["num"]), level])
    return markdown(["Bits", "Backend", "Images", "PSNR"], rows)


@table
def feature_sensitivity() -> str:
    """What the feature distance sees."""
    found = read("feature_sensitivity.json")["distances"]
    rows = [[name, f"{value:.2f}"] for name, value in found.items()]
    return markdown(["Change to the test images", "fd_fashion to the training set"], rows)


@table
def residual_branch() -> str:
    """One bit more in the grid beside a binary residual branch."""
    rows = []
    for width, errors in read("residual_branch.json")["relative_error"].items():
        for part in ("all channels", "salient tenth"):
            grid, branch = errors[f"finer grid, {part}"], errors[f"residual branch, {part}"]
            gain = f"{100 * (1 - branch / grid):.1f} %"
            rows.append([f"{width}, {part}", f"{grid:.4f}", f"{branch:.4f}", gain])
    head = ["Relative error of the weights", "Finer grid", "Residual branch"]
    return markdown([*head, "The branch is lower by"], rows)
