"""Offloading, with the CPU as the accelerator, and storage in fewer bits."""

from __future__ import annotations

import accelerate
import torch

from behaviour import behaviour, need
from behaviour_subjects import FLOAT, Subject

GROUP = "Memory"
CPU = torch.device("cpu")


def twice(s: Subject, wanted: torch.Tensor) -> None:
    """The second call finds the tensors where the first one has left them."""
    for _ in range(2):
        s.same(s.predict(), wanted)


@behaviour(GROUP)
def accelerate_cpu_offload(s: Subject) -> None:
    """`accelerate.cpu_offload`, which sequential offload puts on each component: the same bits."""
    wanted = s.predict()
    accelerate.cpu_offload(s.model, execution_device="cpu")
    twice(s, wanted)


@behaviour(GROUP)
def accelerate_disk_offload(s: Subject) -> None:
    """`accelerate.disk_offload` of the denoiser: the same bits."""
    wanted = s.predict()
    accelerate.disk_offload(s.model, str(s.folder), execution_device=CPU)
    twice(s, wanted)


@behaviour(GROUP)
def model_offload(s: Subject) -> None:
    """`enable_model_cpu_offload` of the pipeline: the same images."""
    pipeline = s.pipeline()
    wanted = s.draw(pipeline, 2)
    pipeline.enable_model_cpu_offload(device="cpu")
    # Float convolutions round differently where a tensor lies elsewhere in memory.
    check = s.close if s.kind == FLOAT else s.same
    check(s.draw(pipeline, 2), wanted)
    pipeline.remove_all_hooks()
    check(s.draw(pipeline, 2), wanted)


def group_offload(s: Subject, **more: object) -> None:
    need(getattr(s.model, "_supports_group_offloading", False), "the class has no group offload")
    wanted = s.predict()
    s.model.enable_group_offload(onload_device=CPU, offload_device=CPU, **more)
    twice(s, wanted)


@behaviour(GROUP)
def group_offload_by_blocks(s: Subject) -> None:
    """`enable_group_offload(offload_type="block_level")`: the same bits."""
    group_offload(s, offload_type="block_level", num_blocks_per_group=1)


@behaviour(GROUP)
def group_offload_by_leaves(s: Subject) -> None:
    """`enable_group_offload(offload_type="leaf_level")`: the same bits."""
    group_offload(s, offload_type="leaf_level")


@behaviour(GROUP)
def group_offload_to_disk(s: Subject) -> None:
    """`enable_group_offload(offload_to_disk_path=...)`: the same bits."""
    group_offload(s, offload_type="leaf_level", offload_to_disk_path=str(s.folder))


@behaviour(GROUP)
def layerwise_casting(s: Subject) -> None:
    """`enable_layerwise_casting` to float8 between calls: nearly the same numbers."""
    wanted = s.predict()
    s.model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for _ in range(2):
        s.close(s.predict(), wanted, 0.3)


@behaviour(GROUP)
def attention_slicing(s: Subject) -> None:
    """`enable_attention_slicing` of the pipeline: the same numbers."""
    need(hasattr(s.float_model, "set_attention_slice"), "the class has no attention slicing")
    wanted = s.predict()
    s.pipeline().enable_attention_slicing(1)
    s.close(s.predict(), wanted)
