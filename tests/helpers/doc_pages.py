"""Pages of the documentation: their code blocks, and the folders that their code opens.

A page says in comments, which readers do not see, what its code needs:

- `<!-- test: needs w4a8 prompts.txt -->`: folders and files of `STAGE`, made before the page runs.
- `<!-- test: given Denoiser -->`: names of `GIVEN` that the page takes for the reader's own.
- `<!-- test: not run, REASON -->` before a block: it stays out, and is counted.

Models are tiny, and `Short` cuts the numbers of images, steps and iterations, which a page chooses
for readers. Nothing else is changed.
"""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from safetensors.torch import save_file

from architectures import build
from lora_files import matrices, of
from plain_denoiser import Denoiser
from single_files import save_as_one_file
from stepquant import api
from stepquant.methods.recipe import WeightOnlyRecipe, load_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?P<before>(?:<!-- test: [^\n]*-->\n)?)```(?P<kind>\w+)\n(?P<code>.*?)```", re.S
)
GIVEN = {"Denoiser": Denoiser}
# As little training as there can be, of each step that trains.
SHORT_STEPS = {
    "iterations": 1,
    "later_iterations": 1,
    "rounds": 1,
    "samples": 16,
    "batch": 8,
    "samples_per_step": 2,
}
# `builtin:` models that pages quantize -> the tiny one in their place.
TINY = {"builtin:fashion-ddpm": "my-ddpm", "builtin:fashion-t2i": "stable-diffusion"}


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    kind: str
    code: str
    not_run: str | None


def name(page: Path) -> str:
    """The page's path below the repository's root."""
    return str(page.relative_to(ROOT))


def blocks(page: Path, kind: str) -> list[Block]:
    """The blocks of one language, in order."""
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        reason = re.search(r"test: not run, (.*?) -->", match["before"])
        found.append(Block(match["kind"], match["code"], reason and reason[1]))
    return [block for block in found if block.kind == kind]


def words(page: Path, key: str) -> list[str]:
    """The words after `test: KEY` in the page's comments."""
    text = page.read_text(encoding="utf-8")
    return [
        word for line in re.findall(rf"<!-- test: {key} (.*?) -->", text) for word in line.split()
    ]


def commands(page: Path) -> list[list[str]]:
    """The `stepquant` command lines of the page, as lists of words."""
    lines = []
    for block in blocks(page, "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            parts = shlex.split(line, comments=True)
            if parts and parts[0] == "stepquant":
                lines.append(parts[1:])
    return lines


def tiny_ddpm() -> DDPMPipeline:
    """As `builtin:fashion-ddpm` but for its size: images of 1 x 32 x 32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=32,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
        )
    return DDPMPipeline(unet=unet.eval(), scheduler=DDIMScheduler(clip_sample=False))


def packed_ddpm(path: Path) -> None:
    settings = {"calibration.trajectories": 1}
    api.quantize(tiny_ddpm(), "minmax", 4, 8, out=path, steps=2, settings=settings)


def lora(path: Path) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(of("unet", matrices(build("sd").unet, [layer])), path)


# Name in the pages -> how it is made.
STAGE: dict[str, Callable[[Path], Any]] = {
    "my-ddpm": lambda path: tiny_ddpm().save_pretrained(path),
    "w4a8": packed_ddpm,
    "stable-diffusion": lambda path: build("sd").save_pretrained(path),
    "sd3": lambda path: build("sd3").save_pretrained(path),
    "flux": lambda path: build("flux").save_pretrained(path),
    "style.safetensors": lambda path: save_as_one_file(build("sd"), path),
    "ink.safetensors": lora,
    "fox.safetensors": lora,
    "sea.safetensors": lora,
    "prompts.txt": lambda path: path.write_text("a cat\na boat\n"),
    "mine.yaml": lambda path: path.write_text(""),
}
SAME = {"w8a8": "w4a8"}


class Stage:
    """Makes each of `STAGE` once and copies it where a page runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, wanted: str, folder: Path) -> Path:
        """`wanted` in `folder`."""
        made = self.folder / SAME.get(wanted, wanted)
        if not made.exists():
            STAGE[made.name](made)
        target = folder / wanted
        if made.is_dir():
            shutil.copytree(made, target, dirs_exist_ok=True)
        else:
            shutil.copy(made, target)
        return target


class Short:
    """The verbs with few images, steps and iterations, whatever a page says."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.stage, self.folder = stage, folder

    def quantize(self, *args: Any, **kwargs: Any) -> Any:
        given = self._bound(api_quantize, args, kwargs)
        if str(given.get("model")) in TINY:
            given["model"] = self.stage.put(TINY[given["model"]], self.folder)
        recipe = load_recipe(given.get("recipe", "stepquant")).override(
            given.pop("settings", None) or {}
        )
        if isinstance(recipe, WeightOnlyRecipe):
            return api_quantize(**given | {"recipe": recipe})
        settings: dict[str, Any] = {"calibration.trajectories": 2}
        settings |= {"ranges.weights": "minmax", "ranges.activations": "minmax"}
        for step in recipe.steps:
            for key in step.__class__.model_fields.keys() & SHORT_STEPS.keys():
                settings[f"{step.name}.{key}"] = SHORT_STEPS[key]
        given |= {"recipe": recipe.override(settings), "steps": 2}
        return api_quantize(**given)

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        return api_sample(**self._bound(api_sample, args, kwargs) | {"num": 2, "steps": 2})

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        return api_evaluate(**self._bound(api_evaluate, args, kwargs) | {"num": 4, "steps": 2})

    def bench(self, *args: Any, **kwargs: Any) -> Any:
        return api_bench(**self._bound(api_bench, args, kwargs) | {"repeats": 1})

    def inspect(self, *args: Any, **kwargs: Any) -> Any:
        return api_inspect(**self._bound(api_inspect, args, kwargs) | {"num": 1, "steps": 2})

    @staticmethod
    def _bound(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
        return dict(inspect.signature(function).bind(*args, **kwargs).arguments)

    def verbs(self) -> dict[str, Callable[..., Any]]:
        """Name -> the verb in short."""
        names = ("quantize", "sample", "evaluate", "bench", "inspect")
        return {verb: getattr(self, verb) for verb in names}


api_quantize, api_sample = api.quantize, api.sample
api_evaluate, api_bench, api_inspect = api.evaluate, api.bench, api.inspect


def shortened(code: str) -> str:
    """The page's code with few steps where it calls a pipeline of diffusers itself."""
    return re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", code)
