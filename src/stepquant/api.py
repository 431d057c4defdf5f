"""The public functions, one for each verb of the command line."""

from stepquant.bench import bench
from stepquant.demo import demo
from stepquant.inspection import inspect
from stepquant.judge import evaluate
from stepquant.quantize import Quantized, quantize
from stepquant.recipe import load_recipe, recipe_names
from stepquant.sampling import sample_images
from stepquant.sources import open_pipeline as load

__all__ = [
    "Quantized",
    "bench",
    "demo",
    "evaluate",
    "inspect",
    "load",
    "load_recipe",
    "quantize",
    "recipe_names",
    "sample",
]


def sample(model, num=16, steps=50, seed=0, scheduler="ddim", batch=64, reporter=None, **call):  # type: ignore[no-untyped-def]
    """Images of `model` (name, folder, hub id or pipeline), float32 `[num, C, H, W]` in [0, 1].

    Image `i` starts from the noise of seed `seed + i`; see `stepquant.sampling.sample_images`.
    """
    return sample_images(load(model), num, steps, seed, scheduler, batch, reporter, **call)
