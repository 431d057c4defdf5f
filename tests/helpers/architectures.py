"""Tiny pipelines with random weights, one for each architecture; nothing is downloaded."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from stepquant.calibration.trajectories import capture_trajectories, drawer
from stepquant.methods.session import Session
from stepquant.models.adapter import adapter_for
from stepquant.pipelines.conditioning import Conditioning
from stepquant.quantizers import StepContext
from stepquant.simulation.scheme import Scheme
from stepquant.simulation.simulate import simulate
from stepquant.support.progress import Reporter
from stepquant.support.work_folder import WorkFolder

WIDTH = 16  # of the texts' embeddings
TOKENS = 8


@dataclass
class Architecture:
    """A pipeline's builder, what a call of it needs here, and what an adapter must find in it.

    `blocks`, `folds`, `modulations`: how many, counted by hand in the architecture's definition.
    """

    build: Callable[[], DiffusionPipeline]
    conditions: dict[str, Any]
    component: str = "transformer"
    call: dict[str, Any] = field(default_factory=dict)
    blocks: int | None = None
    folds: int = 0
    modulations: int = 0

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `quantize` and `sample`."""
        return {**self.conditions, "call": self.call}


def clip_tokenizer() -> CLIPTokenizer:
    names = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase]
    names += [f"{letter}</w>" for letter in string.ascii_lowercase]
    vocabulary = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def clip_encoder(projected: bool = False) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=WIDTH,
        intermediate_size=24,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_tokenizer() -> T5Tokenizer:
    entries = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    entries += [(letter, -3.0) for letter in string.ascii_lowercase]
    return T5Tokenizer(vocab=entries, extra_ids=0, model_max_length=TOKENS)


def t5_encoder(width: int = WIDTH) -> nn.Module:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=30, **sizes)).eval()


def vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        shift_factor=0.1,
    ).eval()


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, steps_offset=1)


def condition_unet(**changes: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**settings, **changes})


def stable_diffusion() -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=with_weights(condition_unet()),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> DiffusionPipeline:
    unet = condition_unet(
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=WIDTH + 24,
        transformer_layers_per_block=(2, 1),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=with_weights(unet),
        scheduler=scheduler(),
        add_watermarker=False,
    )


def dit() -> DiffusionPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,  # the pipeline knows no other number of classes
    )
    return DiTPipeline(transformer=with_weights(transformer), vae=vae(4), scheduler=scheduler())


def pixart(sizes: bool = False) -> DiffusionPipeline:
    """PixArt-alpha of 512 pixels; of 1024 with `sizes`, which the picture's size is told."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3 if sizes else 2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=128 if sizes else 8,  # by which the pipeline knows
        patch_size=2,
        cross_attention_dim=24 if sizes else 16,
        caption_channels=WIDTH,
        use_additional_conditions=sizes,
    )
    return PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=vae(4),
        transformer=with_weights(transformer),
        scheduler=scheduler(),
    )


def stable_diffusion_3() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=with_weights(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4),
        text_encoder=clip_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(2 * WIDTH),
        tokenizer_3=t5_tokenizer(),
    )


def flux() -> DiffusionPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(4),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=with_weights(transformer),
    )


def wan_transformer() -> WanTransformer3DModel:
    """Of a class that keeps modules in float32, with a convolution in three dimensions."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    ).eval()


WAN_CALL = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 8}


def wan() -> DiffusionPipeline:
    """A pipeline with two denoisers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WanPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=t5_encoder(),
            vae=AutoencoderKLWan(
                base_dim=3,
                z_dim=16,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
            ).eval(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=wan_transformer(),
            transformer_2=wan_transformer(),
            boundary_ratio=0.9,
        )


def with_weights(denoiser: nn.Module) -> nn.Module:
    """In-channels of different strength, norms that are no identity, nothing that starts at zero.

    So that Weight Dilation has something to do, and a fold that is wrong is seen.
    """
    for module in denoiser.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            strength = (0.5 * torch.randn(module.weight.shape[1])).exp()
            module.weight.data.mul_(strength.view(1, -1, *(1,) * (module.weight.dim() - 2)))
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
    return denoiser.eval()


PROMPTS = {"prompts": ["a cat", "boat", "fog"]}
SMALL = {"height": 16, "width": 16}
ARCHITECTURES = {
    # Resnets, four transformers with proj_in and proj_out, resamplers, time embedding, outer convs;
    # in each transformer its norm, three layer norms, two values and GEGLU.
    "sd": Architecture(stable_diffusion, PROMPTS, "unet", blocks=8 + 4 * 3 + 2 + 3, folds=4 * 7),
    "sdxl": Architecture(stable_diffusion_xl, PROMPTS, "unet"),
    # Two norms of each block are modulated. The norm before the output, here and below, is
    # modulated by one unit and read by another.
    "dit": Architecture(dit, {}, blocks=2 + 3, folds=2, modulations=4),
    "pixart": Architecture(
        pixart,
        PROMPTS,
        call={"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 8},
        blocks=2 + 2 + 2 + 1,
        folds=4,
    ),
    # Modulated: four norms of the first block and its second attention, three of the last block,
    # whose text ends there.
    "sd3": Architecture(
        stable_diffusion_3,
        PROMPTS,
        call={"max_sequence_length": 8},
        blocks=2 + 2 + 1 + 1 + 2,
        folds=1,
        modulations=5 + 3,
    ),
    # Modulated: four norms of the double block, one of the single one.
    "flux": Architecture(
        flux,
        PROMPTS,
        call={**SMALL, "max_sequence_length": 8},
        blocks=2 + 3 + 1 + 1 + 2,
        modulations=4 + 1,
    ),
}


def build(name: str) -> DiffusionPipeline:
    """The pipeline `name`, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ARCHITECTURES[name].build()


def session(name: str, weights: int = 4, activations: int = 8, steps: int = 3) -> Session:
    """A session as `quantize` has it, of two trajectories."""
    pipeline, architecture = build(name), ARCHITECTURES[name]
    conditioning = Conditioning.of(**architecture.arguments)
    model = getattr(pipeline, architecture.component)
    adapter = adapter_for(model)
    trajectories = capture_trajectories(pipeline, 2, steps, 7, "auto", conditioning=conditioning)
    context = StepContext(trajectories.grid())
    scheme = Scheme(weight_bits=weights, activation_bits=activations, attention_bits=8)
    simulation, _ = simulate(model, adapter, scheme, context)
    return Session(
        float_model=model,
        model=simulation,
        adapter=adapter,
        context=context,
        trajectories=trajectories,
        scheduler=pipeline.scheduler,
        draw=drawer(pipeline, steps, "auto", conditioning),
        weight_ranges="minmax",
        activation_ranges="minmax",
        seed=0,
        reporter=Reporter(quiet=True),
        work=WorkFolder(None, {}, False),
    )
