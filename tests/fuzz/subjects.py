"""The files that are attacked, and what is done with them.

A subject writes sound files to a folder, names those that are changed, and returns a value of a
folder. With `exact`, that value must be the sound one or a refusal: the files hold their own
digests. The others hold values that anybody may set, so any result will do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

import stepquant
from architectures import build
from lora_files import matrices, of
from packed_models import outputs, packed_pipeline
from stepquant.checkpoint.file_sums import SUMS_NAME
from stepquant.checkpoint.load import load_pipeline
from stepquant.checkpoint.module import load_module
from stepquant.checkpoint.save import save_pipeline
from stepquant.lora.pipeline import load_lora, unload_lora
from stepquant.methods.recipe import load_recipe
from stepquant.pipelines.denoiser_pipeline import DenoiserPipeline
from stepquant.verbs import quantize as verb
from stepquant.verbs.quantize import quantize
from stepquant.weight_only.conversion import convert

RECIPES = Path(stepquant.__file__).parent / "recipes"
FEW = {"calibration.trajectories": 2}


@dataclass(frozen=True)
class Subject:
    """`write(folder)` makes the sound files. `use(folder, out)` gives a value; `out` is free."""

    name: str
    write: Callable[[Path], object]
    use: Callable[[Path, Path], Any]
    changed: Callable[[Path], list[str]]
    cases: int
    exact: bool = True


class Denoiser(nn.Module):
    """Of a user's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The prediction."""
        return self.last(torch.tanh(self.first(sample)))


def files(*suffixes: str) -> Callable[[Path], list[str]]:
    """All files below a folder that end so, but the digests: who edits those may edit the rest."""

    def found(folder: Path) -> list[str]:
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]
        return [name for name in names if name.endswith(suffixes) and name != SUMS_NAME]

    return found


def digest(*values: Any) -> str:
    """Of tensors, modules and JSON values."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, nn.Module):
            value = list(value.state_dict().values())
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            data = value.detach().cpu().contiguous().reshape(-1)
            found.update(data.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, list | tuple):
            found.update(digest(*value).encode())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


def tree(folder: Path) -> str:
    """Of all files below a folder."""
    names = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return digest([(str(path.relative_to(folder)), path.read_bytes()) for path in names])


def parts(pipeline: Any) -> str:
    """Of what a pipeline computes with."""
    modules = [getattr(pipeline, name) for name in sorted(pipeline.components)]
    settings = [dict(each.config) for each in modules if hasattr(each, "set_timesteps")]
    for each in settings:
        for key in [key for key in each if key.startswith("_")]:
            del each[key]
    return digest([each for each in modules if isinstance(each, nn.Module)], settings)


def write_checkpoint(folder: Path) -> None:
    """A packed UNet with attention, a bypass and mixed bits."""
    save_pipeline(packed_pipeline(attention=True, bypass=True), "unet", folder)


def use_checkpoint(folder: Path, out: Path) -> str:
    """Load and run."""
    pipeline = load_pipeline(folder)
    return parts(pipeline) + digest(outputs(pipeline.unet))


def write_resaved(folder: Path) -> None:
    """A packed and a weight-only model without the digests of the other files."""
    first = folder.with_name(folder.name + "-first")
    write_weight_only(first)
    load_pipeline(first).save_pretrained(folder, max_shard_size="40KB")


def module_pipeline() -> DenoiserPipeline:
    """Around a module that diffusers does not know."""
    torch.manual_seed(0)
    return DenoiserPipeline(Denoiser().eval(), (1, 8, 8))


def write_module(folder: Path) -> None:
    """A packed module of a user's own code."""
    quantize(module_pipeline(), "minmax", 4, 8, folder, 2, FEW)


def use_module(folder: Path, out: Path) -> str:
    """Load and run."""
    model = load_module(Denoiser(), folder)
    with torch.no_grad():
        return digest(model, model(torch.linspace(-1, 1, 64).view(1, 1, 8, 8), torch.tensor(5)))


def write_float(folder: Path) -> None:
    """A text-to-image pipeline in shards."""
    build("sd").save_pretrained(folder, max_shard_size="40KB")


def write_weight_only(folder: Path) -> None:
    """Its UNet in 4 bits, VAE and text encoder in 8 bits, each in a way of its own."""
    pipeline = build("sd")
    quantize(pipeline, "minmax", 4, 8, folder, 2, FEW, prompts="a", components={"vae": "w8"})


def write_streamed(folder: Path) -> None:
    """All of it from shards to shards."""
    source = folder.with_name(folder.name + "-float")
    build("sd").save_pretrained(source)
    convert(source, folder, components={"vae": "w8"})


def write_text(folder: Path) -> None:
    """With a text encoder of few bits."""
    quantize(
        build("sd"), "minmax", 4, 8, folder, 2, FEW, prompts="a", components={"text_encoder": "w4"}
    )


def use_parts(folder: Path, out: Path) -> str:
    """Load."""
    return parts(load_pipeline(folder))


def use_conversion(folder: Path, out: Path) -> str:
    """Convert and load."""
    convert(folder, out)
    return parts(load_pipeline(out))


LAYERS = ("mid_block.attentions.0.to_q", "mid_block.resnets.0.conv1")


def write_lora(folder: Path) -> None:
    """A LoRA and its settings, as peft writes them."""
    folder.mkdir()
    model = UNet2DConditionModel.from_config(build("sd").unet.config)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "attn1.to_q" in n]
    tensors = of("unet", matrices(model, names[:2]))
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    settings = '{"r": 3, "lora_alpha": 6, "use_rslora": false, "alpha_pattern": {"to_q": 3}}'
    (folder / "adapter_config.json").write_text(settings)


KEPT: dict[str, Any] = {}


def use_lora(folder: Path, out: Path) -> str:
    """Load, look at the branches, unload; the pipeline is left as it was."""
    if "lora" not in KEPT:
        KEPT["lora"] = build("sd")
    pipeline = KEPT["lora"]
    before = parts(pipeline)
    try:
        return digest(load_lora(pipeline, folder, 0.5, "it"))
    finally:
        unload_lora(pipeline)
        assert parts(pipeline) == before, "the pipeline was changed"


def write_recipes(folder: Path) -> None:
    """Shipped ones, of both kinds."""
    folder.mkdir()
    for name in ("minmax", "mpq-dm-plus", "stepquant", "weight-only"):
        (folder / f"{name}.yaml").write_bytes((RECIPES / f"{name}.yaml").read_bytes())


def use_recipes(folder: Path, out: Path) -> str:
    """Read all, and write them again."""
    found = []
    for path in sorted(folder.iterdir()):
        recipe = load_recipe(path)
        again = out.with_suffix(".yaml")
        again.write_text(recipe.to_yaml())
        assert load_recipe(again) == recipe, "the recipe reads otherwise than it was written"
        found.append(recipe.to_dict())
    return digest(found)


class Stopped(Exception):
    """In the place of an interrupt."""


def write_work(folder: Path) -> None:
    """Unfinished work, all but the result."""

    def stop(*_: Any) -> None:
        raise Stopped

    packed, verb.packed_denoiser = verb.packed_denoiser, stop  # type: ignore[assignment]
    try:
        folder.mkdir()
        quantize(module_pipeline(), "minmax", 4, 8, folder / "out", 2, FEW)
    except Stopped:
        pass
    finally:
        verb.packed_denoiser = packed


def use_work(folder: Path, out: Path) -> str:
    """Go on."""
    quantize(module_pipeline(), "minmax", 4, 8, folder / "out", 2, FEW, resume=True)
    return tree(folder / "out")


WEIGHTS = (".safetensors", ".json")
SUBJECTS = (
    Subject("checkpoint", write_checkpoint, use_checkpoint, files(*WEIGHTS), 60),
    Subject("module", write_module, use_module, files(*WEIGHTS), 80),
    Subject("weight-only", write_weight_only, use_parts, files(*WEIGHTS), 20),
    Subject("streamed", write_streamed, use_parts, files(*WEIGHTS), 20),
    Subject("text", write_text, use_parts, files(*WEIGHTS), 20),
    Subject("resaved", write_resaved, use_parts, files(*WEIGHTS), 12, exact=False),
    Subject("float", write_float, use_conversion, files(*WEIGHTS), 15, exact=False),
    Subject("lora", write_lora, use_lora, files(*WEIGHTS), 150, exact=False),
    Subject("recipes", write_recipes, use_recipes, files(".yaml"), 120, exact=False),
    Subject("work", write_work, use_work, files(*WEIGHTS), 60),
)
