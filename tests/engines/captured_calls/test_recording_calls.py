"""What is written down of a call, and what a replay of it gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fused_paths import GRID, draw, image
from stepquant.engines.captured_calls.recorder import NativeCall, NotRecordable, Operator, Recorder
from stepquant.runtime.ops import fused, native

needs_library = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))


def recorded(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Recorder, Tensor, Tensor]:
    """The recorder, the result's place, and what the recorded call returned there."""
    recorder = Recorder()
    with torch.no_grad(), recorder.listening():
        y = function(x)
    place = recorder.memory.kept(y)
    return recorder, place, y.clone()


def assert_replays(function: Callable[[Tensor], Tensor], x: Tensor) -> Recorder:
    first, second = x.clone(), x.flip(-1) * 2 + 1
    own = x.clone()
    recorder, place, found = recorded(function, own)
    assert torch.equal(found, function(first))
    for given in (second, first, second):
        own.copy_(given)
        for call in recorder.calls:
            call()
        assert torch.equal(place, function(given.clone()))
    return recorder


def in_place(x: Tensor) -> Tensor:
    y = x * 2
    y[1].add_(x[0])
    y[:, 2:] -= 1
    return y.t()


def views_only(x: Tensor) -> Tensor:
    first, *_, last = x.unbind(0)
    return torch.cat([first.view(2, -1), last[None].expand(2, -1)[:, :4]], dim=1)


def several_results(x: Tensor) -> Tensor:
    values, indices = x.sort(dim=-1)
    means, deviations = torch.std_mean(x, dim=-1)[::-1]
    return values + indices + means[:, None] / deviations[:, None]


def attention(x: Tensor) -> Tensor:
    heads = x.repeat(3, 1).view(1, 2, 3, 20)[..., :8]
    return functional.scaled_dot_product_attention(heads, heads + 1, heads)


def made_inside(x: Tensor) -> Tensor:
    return x * torch.arange(x.shape[1]) + torch.tensor([[1.5]]) + torch.zeros_like(x)


def without_the_graph(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(x.detach()).reshape(-1)[3:]


@pytest.mark.parametrize(
    "function",
    [in_place, views_only, several_results, attention, made_inside, without_the_graph],
    ids=lambda each: each.__name__,
)
@needs_library
def test_operators_of_torch(function: Callable[[Tensor], Tensor]) -> None:
    assert_replays(function, draw(2, 20))


@needs_library
def test_values_that_die_share_memory() -> None:
    def deep(x: Tensor) -> Tensor:
        for _ in range(30):
            x = torch.sin(x) * 1.5
        return x

    recorder = assert_replays(deep, draw(4, 1000))
    assert recorder.memory.nbytes <= 3 * 16000 + 3 * 64


@needs_library
def test_native_kernels_are_called_again_on_the_same_memory() -> None:
    def codes(x: Tensor) -> Tensor:
        return fused.encode(x, "silu", GRID, (1, 1)).to(torch.float32) * x.mean()

    recorder = assert_replays(codes, image(2, 24, 5, 5))
    kinds = [type(call) for call in recorder.calls]
    assert kinds.count(NativeCall) == 1 and kinds.count(Operator) == len(kinds) - 1


@needs_library
def test_native_kernels_inside_an_operator_are_not_called_twice() -> None:
    @torch.library.custom_op("stepquant_test::codes", mutates_args=())
    def codes(x: Tensor) -> Tensor:
        return fused.encode(x, "none", GRID)

    recorder = assert_replays(lambda x: codes(x).to(torch.float32), draw(3, 40))
    assert all(isinstance(call, Operator) for call in recorder.calls)


@needs_library
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * float(x.sum()),
        lambda x: x + 1 if bool((x > 0).all()) else x,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
    ],
    ids=["number", "branch", "mask", "indices"],
)
def test_what_is_read_out_of_a_tensor_is_not_recordable(
    function: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(NotRecordable, match="reads numbers out of a tensor"):
        recorded(function, draw(2, 20))


@needs_library
def test_sparse_tensors_are_not_recordable() -> None:
    with pytest.raises(NotRecordable, match="no plain tensor"):
        recorded(lambda x: x.to_sparse_csr().to_dense(), draw(4, 4))


@needs_library
def test_listening_ends_with_the_call() -> None:
    before = native.library()
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError), recorder.listening():
        assert native.library() is not before
        raise ZeroDivisionError
    assert native.library() is before
    fused.encode(draw(3), "none", GRID)
    assert recorder.calls == []
