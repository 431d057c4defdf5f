"""Memory of recorded calls: reused as values die, and only then."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepquant.engines.captured_calls.memory import ALIGNMENT, Block, Memory


def test_a_value_keeps_its_block_until_it_and_its_views_are_gone() -> None:
    memory = Memory()
    first = memory.empty((4, 8), (8, 1), torch.float32)
    address, view = first.data_ptr(), first[1:, 2]
    del first
    assert memory.empty((4, 8), (8, 1), torch.float32).data_ptr() != address
    del view
    assert memory.empty((32,), (1,), torch.float32).data_ptr() == address


def test_what_a_replay_holds_does_not_keep_a_block() -> None:
    memory = Memory()
    value = memory.empty((2, 3, 5), (15, 1, 3), torch.bfloat16)
    address, part = value.data_ptr(), value[1, 1:]
    kept = memory.kept(part)
    assert kept.data_ptr() == part.data_ptr() and kept.stride() == part.stride()
    assert kept.shape == part.shape and kept.dtype == part.dtype
    value.fill_(3)
    assert bool((kept == 3).all())
    del value, part
    assert memory.empty((30,), (1,), torch.bfloat16).data_ptr() == address


def test_tensors_from_elsewhere_are_kept_as_they_are() -> None:
    memory, weight = Memory(), torch.ones(3)
    assert memory.kept(weight) is weight
    empty = memory.empty((0, 5), (5, 1), torch.float32)
    assert empty.shape == (0, 5) and memory.kept(empty) is empty and memory.nbytes == 0


@given(
    sizes=st.lists(st.integers(1, 7), min_size=0, max_size=4),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.bool]),
    order=st.randoms(use_true_random=False),
)
def test_sizes_strides_and_alignment(sizes: list[int], dtype: torch.dtype, order) -> None:
    dims = list(range(len(sizes)))
    order.shuffle(dims)
    strides = (
        torch.empty(sizes)
        .permute(dims)
        .contiguous()
        .permute([dims.index(i) for i in range(len(dims))])
        .stride()
    )
    tensor = Memory().empty(sizes, strides, dtype)
    assert tuple(tensor.shape) == tuple(sizes) and tensor.stride() == strides
    assert tensor.dtype == dtype and tensor.data_ptr() % ALIGNMENT == 0
    tensor.fill_(1)
    assert bool((tensor == 1).all())


def test_small_values_leave_large_blocks_to_large_ones() -> None:
    memory = Memory()
    for count in (1000, 300, 300, 400, 1000):  # each is gone at once
        memory.empty((count,), (1,), torch.float32)
    assert memory.nbytes == sum(-(-4 * count // 64) * 64 for count in (1000, 300, 400))


@pytest.mark.parametrize("count", [1, 64, 4096])
def test_blocks_begin_at_whole_lines(count: int) -> None:
    block = Block(count)
    assert block.address % ALIGNMENT == 0 and len(block) == count and block.free
