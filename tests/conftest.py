"""What every room's tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hypothesis import settings
from torch import nn

from fused_paths import PATHS, Path
from stepquant.calibration.trajectories import capture_trajectories, drawer
from stepquant.methods.session import Session
from stepquant.models.adapter import adapter_for
from stepquant.pipelines.sampling import set_scheduler
from stepquant.quantizers import QuantConv2d, QuantLayer, QuantLinear, StepContext, StepGrid
from stepquant.quantizers.weight import minmax_weight_range
from stepquant.runtime.ops import native
from stepquant.simulation.scheme import Scheme
from stepquant.simulation.simulate import simulate as simulate_model
from stepquant.support.progress import Reporter
from stepquant.support.work_folder import WorkFolder

# The same examples on every machine, and no verdict by stopwatch.
settings.register_profile("stepquant", deadline=None, derandomize=True)
settings.load_profile("stepquant")


def pytest_report_header() -> str:
    """Tests of native kernels skip themselves where there are none: tell which it is."""
    library = native.library()
    return f"native kernels: {native.why_not() if library is None else library.level}"


Simulate = Callable[..., QuantLayer]
BuildUNet = Callable[..., UNet2DModel]


@pytest.fixture
def context() -> StepContext:
    """Five steps at the timesteps 0, 10, 20, 30, 40."""
    return StepContext(StepGrid(torch.arange(5) * 10))


@pytest.fixture
def simulate(context: StepContext) -> Simulate:
    """Builds a quantizing layer: weight ranges from the weight, random step tables."""

    def build(
        layer: nn.Linear | nn.Conv2d,
        weight_bits: int = 8,
        activation_bits: int = 8,
        splits: tuple[int, ...] | None = None,
        steps: int = 5,
        quantizing: bool = True,
    ) -> QuantLayer:
        kind = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
        quantized = kind(layer, weight_bits, activation_bits, context, splits)
        pairs = zip(quantized.weight_quantizers, quantized.weight_parts(), strict=True)
        for quantizer, weight in pairs:
            quantizer.fit(weight, minmax_weight_range)
        generator = torch.Generator().manual_seed(steps)
        codes = 2**activation_bits
        for quantizer in quantized.activation_quantizers:
            quantizer.resize(steps)
            scale = (0.5 + torch.rand(steps, generator=generator)) * 4 / codes
            quantizer.scale.data.copy_(scale)
            quantizer.zero_point.data.copy_(
                torch.randint(codes // 4, codes // 2 + 1, (steps,), generator=generator)
            )
        quantized.quantizing = quantizing
        return quantized

    return build


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bits that depend on the number of threads, as those of a trained model do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_unet() -> BuildUNet:
    """Builds a float UNet with random weights: 17 blocks, 50 layers, attention in three places.

    In-channels differ in strength, so that Weight Dilation has something to do.
    """

    def build(**changes: object) -> UNet2DModel:
        settings = {
            "sample_size": 16,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (16, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = UNet2DModel(**{**settings, **changes}).eval()
            for module in unet.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    strength = (0.5 * torch.randn(module.weight.shape[1])).exp()
                    module.weight.data.mul_(strength.view(1, -1, *(1,) * (module.weight.dim() - 2)))
                elif isinstance(module, nn.GroupNorm):
                    module.weight.data.uniform_(0.5, 1.5)
                    module.bias.data.uniform_(-0.5, 0.5)
        return unet

    return build


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_unet: BuildUNet) -> Callable[..., DDPMPipeline]:
    """Builds a DDPM pipeline around `tiny_unet`."""

    def build(**changes: object) -> DDPMPipeline:
        return DDPMPipeline(unet=tiny_unet(**changes), scheduler=DDPMScheduler())

    return build


@pytest.fixture(scope="session")
def tiny_session(tiny_pipeline: Callable[..., DDPMPipeline]) -> Callable[..., Session]:
    """Builds a session as `quantize` does: two trajectories of three DDIM steps by default."""

    def build(
        weights: int = 4,
        activations: int = 8,
        steps: int = 3,
        num: int = 2,
        ranges: str = "minmax",
        work: WorkFolder | None = None,
        attention: int | None = None,
        probabilities: int = 8,
        **changes: object,
    ) -> Session:
        pipeline = tiny_pipeline(**changes)
        adapter = adapter_for(pipeline.unet)
        trajectories = capture_trajectories(pipeline, num, steps, 7, "ddim")
        context = StepContext(trajectories.grid())
        sampler = copy.copy(pipeline)
        set_scheduler(sampler, "ddim")
        sampler.scheduler.set_timesteps(steps)
        scheme = Scheme(
            weight_bits=weights,
            activation_bits=activations,
            attention_bits=attention,
            probability_bits=probabilities,
        )
        model, _ = simulate_model(pipeline.unet, adapter, scheme, context)
        return Session(
            float_model=pipeline.unet,
            model=model,
            adapter=adapter,
            context=context,
            trajectories=trajectories,
            scheduler=sampler.scheduler,
            draw=drawer(pipeline, steps, "ddim"),
            weight_ranges=ranges,
            activation_ranges=ranges,
            seed=0,
            reporter=Reporter(quiet=True),
            work=work or WorkFolder(None, {}, False),
        )

    return build


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Path:
    """The functions of `runtime.ops.fused`, in each of their forms."""
    return Path(request.param)
