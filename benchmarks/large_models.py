"""Memory and time of large models in small memory.

    python benchmarks/large_models.py sd15-calibrate sdxl-pack
    python benchmarks/large_models.py flux-pack  # 24 GB of shards in --folder, deleted at the end

Writes random bf16 shards of the published sizes, quantizes them in a process of its own, and
records peak memory, seconds and bytes in `large_models.json`, job by job. `--small` runs the same
with tiny models.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import string
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cells import machine
from stepquant.support.atomic import atomic_write
from stepquant.support.process_memory import peak_memory_mb
from stepquant.support.progress import Reporter
from stepquant.verbs.quantize import quantize
from stepquant.weight_only.conversion import convert

SHARD_BYTES = 2 << 30
WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL_UNET = {"block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1}
SMALL_SD15 = {
    **SMALL_UNET,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "sample_size": 16,
}
SMALL_SDXL = {
    **SMALL_UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
}
SMALL_FLUX = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2}
MAX_TOKENS = 77
SETTINGS = ("grids", "trajectories", "steps", "iterations", "batch", "height", "guidance")


@dataclass(frozen=True)
class Job:
    """One model and what is done with it; limits are the issue's, in GiB."""

    component: str
    kind: str
    config: dict[str, Any]
    small: dict[str, Any]
    run: Callable[[Path, Path, argparse.Namespace], dict[str, Any]]
    limit_gib: float


def run_pack(source: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    return convert(source, out, 4, args.grids, reporter=Reporter())


def run_calibrate(source: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    settings = {
        "calibration.trajectories": args.trajectories,
        "ranges.weights": args.grids,
        "ranges.activations": args.grids,
        "block_distillation.iterations": args.iterations,
        "block_distillation.batch": args.batch,
        "calibration.batch": args.batch,
    }
    conditions: dict[str, Any] = {"prompts": ["a cat", "a dog"], "guidance": args.guidance}
    if args.height:
        conditions["call"] = {"height": args.height, "width": args.height}
    result = quantize(
        source,
        "dilatequant",
        4,
        8,
        out,
        args.steps,
        settings,
        reporter=Reporter(),
        memory=8,
        **conditions,
    )
    record = dict(result.record)
    losses = record.pop("summary")["block_distillation"]
    for key in ("left_float", "attention_float", "reference_layers"):
        record[key] = len(record[key])
    return {**record, "blocks": len(losses), "last_block": losses[-1]}


JOBS = {
    "sd15-calibrate": Job(
        "unet",
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768},
        {**SMALL_SD15, "cross_attention_dim": 768},
        run_calibrate,
        8,
    ),
    "sdxl-pack": Job("unet", "UNet2DConditionModel", SDXL, {**SDXL, **SMALL_SDXL}, run_pack, 6),
    "flux-pack": Job(
        "transformer",
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        {"guidance_embeds": True, **SMALL_FLUX},
        run_pack,
        6,
    ),
}


def write_weights(folder: Path, kind: str, config: dict[str, Any], seed: int = 0) -> int:
    """A component of the class `kind` with random bf16 weights, in shards; its parameters."""
    with init_empty_weights():
        model = getattr(diffusers, kind)(**config)
    folder.mkdir(parents=True)
    model.save_config(folder)
    empty = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern=WEIGHTS, max_shard_size=SHARD_BYTES
    )
    generator = torch.Generator().manual_seed(seed)
    for name, members in split.filename_to_tensors.items():
        shard = {key: random_tensor(key, empty[key].shape, generator) for key in members}
        save_file(shard, folder / name, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = folder / f"{WEIGHTS.format(suffix='')}.index.json"
        path.write_text(json.dumps(index))
    return sum(tensor.numel() for tensor in empty.values())


def random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Weights that keep the scale of what they are applied to; norms of 1, biases of 0."""
    if len(shape) < 2:
        return (torch.zeros if name.endswith("bias") else torch.ones)(shape, dtype=torch.bfloat16)
    values = torch.randn(shape, generator=generator)
    return values.mul_(1 / math.sqrt(math.prod(shape[1:]))).to(torch.bfloat16)


def write_pipeline(folder: Path, job: Job, small: bool) -> int:
    """A diffusers folder around the component; the parameters of that."""
    parameters = write_weights(folder / job.component, job.kind, job.small if small else job.config)
    index: dict[str, Any] = {job.component: ["diffusers", job.kind]}
    if job.component == "transformer":
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        index["_class_name"] = "FluxPipeline"
    else:
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            steps_offset=1, set_alpha_to_one=False,
        )  # fmt: skip
        index["_class_name"] = "StableDiffusionPipeline"
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    if job.run is run_calibrate:
        index |= write_text_and_vae(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    return parameters


def write_text_and_vae(folder: Path) -> dict[str, Any]:
    """What a text pipeline needs beside the UNet, as small as it goes; entries of the index."""
    letters = string.ascii_lowercase
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=768,
        intermediate_size=768,
        num_hidden_layers=1,
        num_attention_heads=12,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    vae.save_pretrained(folder / "vae")
    return {
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }


def run_job(name: str, args: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Write the shards and quantize them, each in a process of its own, and delete both."""
    job, folder = JOBS[name], args.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        for child in ("write", "quantize"):
            command = [sys.executable, __file__, name, *arguments, "--child", child]
            subprocess.run(command, check=True)
        written = json.loads((folder / "written.json").read_text())
        record = json.loads((folder / "record.json").read_text())
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "job": name,
        "model": f"{job.kind}, random bf16 weights" + (", tiny" if args.small else ""),
        "parameters": written["parameters"],
        "peak_gib": record["peak_memory_mb"] * 1e6 / 2**30,
        "limit_gib": job.limit_gib,
        "seconds_writing_shards": written["seconds"],
        "settings": {
            key: getattr(args, key)
            for key in (SETTINGS if job.run is run_calibrate else ("grids",))
        },
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "record": record,
    }


def child(name: str, args: argparse.Namespace) -> None:
    """One half of the job."""
    folder, job = args.folder / name, JOBS[name]
    started = time.monotonic()
    if args.child == "write":
        record = {"parameters": write_pipeline(folder / "float", job, args.small)}
    else:
        record = job.run(folder / "float", folder / "packed", args)
        # Of the whole process, with the imports and the writing of the result.
        record["peak_memory_mb"] = max(record["peak_memory_mb"], round(peak_memory_mb(), 1))
    record["seconds"] = round(time.monotonic() - started, 1)
    file = "written.json" if args.child == "write" else "record.json"
    (folder / file).write_text(json.dumps(record))


def main() -> None:
    """Run the jobs that are named, and put their records into the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="+", choices=JOBS)
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--grids", choices=("minmax", "mse"), default="minmax")
    parser.add_argument("--trajectories", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--height", type=int, default=None, help="of calibration images, in pixels")
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--folder", type=Path, default=Path("large-models"))
    parser.add_argument("--keep", action="store_true", help="keep shards and packed models")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/large_models.json"))
    parser.add_argument("--child", choices=("write", "quantize"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.jobs[0], args)
        return
    arguments = [word for word in sys.argv[1:] if word not in args.jobs]
    records = json.loads(args.out.read_text()) if args.out.exists() else []
    for name in args.jobs:
        record = run_job(name, args, arguments)
        records = [other for other in records if other["job"] != name] + [record]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(sorted(records, key=lambda entry: entry["job"]), indent=1) + "\n"
        atomic_write(args.out, lambda partial, text=text: partial.write_text(text))
        print(f"{name}: peak {record['peak_gib']:.2f} GiB, {record['record']['seconds']:.0f} s")


if __name__ == "__main__":
    main()
