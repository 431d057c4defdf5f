"""Packed runtime against simulation: per layer on the same input, and image by image.

    python benchmarks/fidelity.py

Quantizes the embedded model at W8A8 and W4A4, compares each packed layer with its simulated twin on
the input it has in a real forward, samples with both (with the fast kernels, and some images with
the reference kernels, which sum up as the simulation does), and reloads the checkpoint. Writes
`fidelity.json`.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cells import machine
from records import write_record
from stepquant.calibration.observe import quant_layers
from stepquant.calibration.trajectories import Trajectories, capture_trajectories
from stepquant.engines.backend import set_backend
from stepquant.evaluation import paired_psnr
from stepquant.pipelines.opening import open_pipeline
from stepquant.pipelines.resolved import ResolvedPipeline, denoiser_of
from stepquant.pipelines.sampling import sample_images
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.support.progress import Reporter
from stepquant.verbs.quantize import quantize

RELOADED = 64  # images for which the reloaded checkpoint is compared: one batch
REFERENCE = 16  # images on the reference kernels, which are slow


@torch.no_grad()
def layer_differences(
    simulation: torch.nn.Module, packed: torch.nn.Module, trajectories: Trajectories
) -> dict[str, float]:
    """Largest difference of each layer's output over its largest output, on sampler inputs."""
    context = next(m.context for m in packed.modules() if isinstance(m, IntegerLayer))
    differences: dict[str, float] = {}

    def compare(name: str, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        theirs = packed.get_submodule(name)(args[0])
        worst = (theirs - output).abs().max() / output.abs().max()
        differences[name] = max(differences.get(name, 0.0), float(worst))

    handles = [
        layer.register_forward_hook(lambda _m, args, y, name=name: compare(name, args, y))
        for name, layer in quant_layers(simulation).items()
    ]
    for timestep in trajectories.timesteps[:: len(trajectories.timesteps) // 5]:
        context.set_timestep(timestep)
        simulation(trajectories.sample[trajectories.timestep == timestep], timestep)
    for handle in handles:
        handle.remove()
    return differences


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fidelity.json"))
    args = parser.parse_args()
    reporter = Reporter()
    pipeline = open_pipeline(args.model)
    float_images = sample_images(pipeline, args.num, 50, reporter=reporter)
    trajectories = capture_trajectories(pipeline, 4, 50, 3_000_000, "ddim", reporter=reporter)
    rows = []
    for bits in (8, 4):
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / "packed"
            settings = {"block_distillation.iterations": 50}
            result = quantize(
                pipeline, "dilatequant", bits, bits, folder, settings=settings, reporter=reporter
            )
            reloaded = open_pipeline(folder)
        simulated = ResolvedPipeline.of(pipeline).with_denoiser(result.simulation).pipeline
        differences = layer_differences(
            result.simulation, denoiser_of(result.pipeline), trajectories
        )
        images = {
            "packed": sample_images(result.pipeline, args.num, 50, reporter=reporter),
            "simulated": sample_images(simulated, args.num, 50, reporter=reporter),
        }
        set_backend(denoiser_of(reloaded), "reference")
        by_reference = sample_images(reloaded, REFERENCE, 50, reporter=reporter)
        theirs = sample_images(simulated, REFERENCE, 50, reporter=reporter)
        set_backend(denoiser_of(reloaded), "auto")
        again = sample_images(reloaded, RELOADED, 50, reporter=reporter)
        psnr = {name: paired_psnr(float_images, images[name]) for name in ("packed", "simulated")}
        each = [
            paired_psnr(f[None], p[None]) - paired_psnr(f[None], s[None])
            for f, p, s in zip(float_images, images["packed"], images["simulated"], strict=True)
        ]
        rows.append(
            {
                "bits": result.record["bits"],
                "worst_layer": max(differences, key=differences.__getitem__),
                "worst_relative_difference": max(differences.values()),
                "psnr_packed_db": psnr["packed"],
                "psnr_simulated_db": psnr["simulated"],
                "psnr_difference_db": abs(psnr["packed"] - psnr["simulated"]),
                "psnr_difference_standard_error_db": statistics.stdev(each) / len(each) ** 0.5,
                "psnr_packed_to_simulated_db": paired_psnr(images["packed"], images["simulated"]),
                "reference_kernels_bit_equal_to_simulation": torch.equal(by_reference, theirs),
                "reload_bit_equal": torch.equal(images["packed"][:RELOADED], again),
            }
        )
        print(rows[-1])
    record = {"model": args.model, "num": args.num, "machine": machine(), "rows": rows}
    write_record(record, args.out)


if __name__ == "__main__":
    main()
