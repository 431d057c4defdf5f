"""The fused passes as operators: the direct calls' numbers, true shapes, one node in a graph."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_paths import COARSE, GRID, TABLE, draw, image
from stepquant.runtime.ops import fused, native, operators, plain
from stepquant.runtime.ops.grids import Grid, Output
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import tiled_weight, tiles
from stepquant.support.errors import StepQuantError

OPS = torch.ops.stepquant
CONV = LayerSpec("conv2d", 5, 16, 8, 8, (3, 3), (2, 1))
LINEAR = LayerSpec("linear", 70, 32, 8, 8)
FACTORS = TABLE._replace(factors=draw(8).abs() + 0.5)


def codes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


def weight_of(spec: LayerSpec, largest: int = 127, biases: bool = False) -> tiled_weight.Weight:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randint(0, largest + 1, spec.weight_shape, generator=generator).to(torch.int8)
    out, sums = spec.out_channels, weight.flatten(1).sum(dim=1, dtype=torch.int32)
    bias, step_bias = (draw(out), draw(3, out, seed=1)) if biases else (None, None)
    scale = draw(out, seed=2).abs() / spec.columns
    return tiled_weight.weight_of(tiles.lay_out(weight, spec), scale, sums, bias, step_bias)


OF_CONV, OF_LINEAR = weight_of(CONV), weight_of(LINEAR)


def group_norm(parts: list[Tensor], *grids: Grid, **more: Any) -> list[Tensor]:
    channels = sum(part.shape[1] for part in parts)
    outputs = [Output(i, channels - i, grid, (i, 1)) for i, grid in enumerate(grids)]
    arguments = {"added": None, "groups": 2, "weight": None, "bias": None, "eps": 1e-5, **more}
    return fused.group_norm_encode(parts, activation="silu", outputs=outputs, **arguments)


def layer_norm(x: Tensor, *grids: Grid, **more: Any) -> list[Tensor]:
    arguments = {"weight": None, "bias": None, "eps": 1e-5, "scale": None, "shift": None, **more}
    return fused.layer_norm_encode(x, grids=grids, **arguments)


CASES: dict[str, Callable[[], Any]] = {
    "encode-image": lambda: fused.encode(image(2, 8, 5, 6), "silu", FACTORS, (1, 2)),
    "encode-contiguous": lambda: fused.encode(draw(1, 3, 4, 5), "none", GRID),
    "encode-one-channel": lambda: fused.encode(draw(2, 1, 4, 5), "none", GRID),
    "encode-rows": lambda: fused.encode(draw(2, 7, 8, dtype=torch.bfloat16), "gelu", FACTORS),
    "encode-float16": lambda: fused.encode(draw(9, dtype=torch.float16), "gelu_tanh", COARSE),
    "encode-nothing": lambda: fused.encode(draw(0, 8, 3, 3), "none", GRID, (1, 1)),
    "group-norm": lambda: group_norm([image(2, 8, 5, 6)], TABLE),
    "group-norm-parts": lambda: group_norm(
        [image(2, 3, 5, 6), draw(2, 5, 5, 6)], TABLE, COARSE, added=draw(2, 8), weight=draw(8)
    ),
    "group-norm-no-outputs": lambda: group_norm([image(1, 4, 2, 2)], bias=draw(4)),
    "layer-norm": lambda: layer_norm(draw(2, 7, 12), GRID),
    "layer-norm-modulated": lambda: layer_norm(
        draw(2, 7, 12, dtype=torch.bfloat16),
        *(TABLE, COARSE, GRID),
        scale=draw(2, 36)[:, 12:24],
        shift=draw(2, 12),
        weight=draw(12),
    ),
    "gated": lambda: fused.gated_encode(draw(2, 7, 16), "gelu", FACTORS),
    "gated-row": lambda: fused.gated_encode(draw(6), "none", GRID),
    "epilogue": lambda: fused.epilogue(TABLE, draw(5), draw(5, seed=1), draw(3, 5), True),
    "epilogue-bias-alone": lambda: fused.epilogue(GRID, draw(5), draw(5), None, False),
    "product-conv": lambda: fused.tiled_product(
        codes(2, 5, 7, 6),
        *(TABLE, weight_of(CONV, biases=True), CONV),
        added=draw(2, 16, 3, 4),
        gate=draw(2, 16),
        dtype=torch.bfloat16,
    ),
    "product-linear": lambda: fused.tiled_product(codes(2, 3, 70), GRID, OF_LINEAR, LINEAR),
    "product-four-bits": lambda: fused.tiled_product(
        *(codes(1, 70), GRID, weight_of(LINEAR, 15), LINEAR), gate=draw(1, 32)
    ),
    "product-nothing": lambda: fused.tiled_product(codes(0, 70), GRID, OF_LINEAR, LINEAR),
    "product-codes": lambda: fused.tiled_product_codes(
        codes(2, 3, 70), TABLE, weight_of(LINEAR, biases=True), LINEAR, "gelu_tanh", False, COARSE
    ),
    "product-gated-codes": lambda: fused.tiled_product_codes(
        codes(3, 70), GRID, weight_of(LINEAR, 15), LINEAR, "gelu", True, GRID
    ),
    "attention": lambda: fused.attention_codes(*attention_inputs(torch.bfloat16), 2, TABLE),
    "attention-float32": lambda: fused.attention_codes(*attention_inputs(torch.float32), 3, GRID),
}


def attention_inputs(dtype: torch.dtype) -> list[Tensor]:
    return [draw(2, rows, 12, seed=rows, dtype=dtype) for rows in (5, 9, 9)]


class Seen(TorchDispatchMode):
    """Keeps calls of our own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "stepquant":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def dispatched(case: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Seen]:
    """The result of `case` by its operator, and the operator's call."""
    monkeypatch.setattr(fused, "_direct", lambda x: False)
    with Seen() as seen:
        found = case()
    return found, seen


def listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_operator_gives_what_the_direct_call_gives(
    case: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = listed(case())
    found, seen = dispatched(case, monkeypatch)
    assert len(seen.calls) == 1 and len(listed(found)) == len(direct)
    for ours, theirs in zip(listed(found), direct, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    torch.library.opcheck(*seen.calls[0])


def test_every_operator_has_a_case() -> None:
    prefixes = {
        "group_norm_encode": "group-norm",
        "layer_norm_encode": "layer-norm",
        "tiled_product": "product-conv",
        "tiled_product_codes": "product-codes",
    }
    for name in operators.OPERATORS:
        prefix = prefixes.get(name, name.partition("_")[0])
        assert any(case.startswith(prefix) for case in CASES), name


def test_another_device_runs_the_plain_form_until_it_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU's tensors here; the dispatcher is told to take the kernel of CUDA's."""
    x, cuda = image(2, 8, 5, 6), torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def encode() -> Tensor:
        values = (x, "silu", *operators.grid_values(TABLE), (1, 1))
        return OPS.encode.default.redispatch(cuda, *values)

    assert torch.equal(encode(), plain.encode(x, "silu", TABLE, (1, 1)))
    with torch.library._scoped_library("stepquant", "FRAGMENT") as library:
        monkeypatch.setattr(operators, "_LIBRARY", library)
        operators.implement("encode", "CUDA", lambda x, activation, grid, padding: x + grid.largest)
        assert torch.equal(encode(), x + 255)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fused.encode(draw(5), "relu", GRID), "unknown activation 'relu'"),
        (
            lambda: group_norm([image(1, 5, 2, 2)], GRID),
            "5 channels: expected a multiple of its 2 groups",
        ),
        (lambda: layer_norm(draw(2, 7), GRID, bias=draw(6)), "the bias is"),
        (lambda: fused.gated_encode(draw(7), "gelu", GRID), "expected an even number"),
        (lambda: fused.epilogue(GRID, draw(5), draw(4), None, True), "the bias is"),
        (
            lambda: fused.tiled_product(codes(2, 70), GRID, OF_CONV, LINEAR),
            "a tiled weight is",
        ),
        (
            lambda: fused.tiled_product(codes(2, 64), GRID, OF_LINEAR, LINEAR),
            "64 channels: expected 70",
        ),
        (
            lambda: fused.tiled_product_codes(
                codes(1, 5, 7, 6), GRID, OF_CONV, CONV, "none", False, GRID
            ),
            "cannot return codes",
        ),
        (
            lambda: fused.attention_codes(*attention_inputs(torch.float32), 5, GRID),
            "expected a multiple of its 5 heads",
        ),
    ],
)
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_an_operator_refuses_what_does_not_fit(
    call: Callable[[], Any], message: str, fake: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_direct", lambda x: False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with pytest.raises(StepQuantError, match=message), mode if fake else torch.no_grad():
        call()


class Passes(nn.Module):
    """A norm with a time embedding, and the codes of its result's halves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)
        self.register_buffer("scale", torch.tensor([0.5, 0.02]))
        self.register_buffer("zero_point", torch.tensor([1, 90], dtype=torch.uint8))

    def forward(self, x: Tensor, embedding: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        grid, norm = Grid(self.scale, self.zero_point, row, 255), self.norm
        (inner,) = fused.group_norm_encode(
            *((x,), embedding, norm.num_groups, norm.weight, norm.bias, norm.eps, "silu"),
            [Output(0, 8, grid, (1, 1))],
        )
        y = (inner.to(torch.float32) * 0.01).tanh()
        return inner, fused.gated_encode(y.permute(0, 2, 3, 1), "gelu", grid)


def passes_and_inputs() -> tuple[Passes, tuple[Tensor, ...]]:
    return Passes(), (image(2, 8, 5, 6), draw(2, 8), torch.tensor([1]))


def test_export_sees_one_node_for_each_pass() -> None:
    module, inputs = passes_and_inputs()
    program = torch.export.export(module, inputs)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    for operator in (OPS.group_norm_encode, OPS.gated_encode):
        assert targets.count(operator.default) == 1
    assert not any("group_norm" in str(each) and "stepquant" not in str(each) for each in targets)
    for other in (inputs, (inputs[0] * 2, *inputs[1:2], torch.tensor([0]))):
        found = program.module()(*other)
        assert all(map(torch.equal, found, module(*other)))


def test_one_graph_serves_every_size_and_row() -> None:
    module, inputs = passes_and_inputs()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    larger = (image(3, 8, 7, 9), draw(3, 8), torch.tensor([0]))
    frames = []
    for each in (inputs, larger):
        assert all(map(torch.equal, compiled(*each), module(*each)))
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] <= 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor_calls_the_native_kernels() -> None:
    module, inputs = passes_and_inputs()
    compiled = torch.compile(module, fullgraph=True)
    inner, gated = compiled(*inputs)
    expected = module(*inputs)
    assert torch.equal(inner, expected[0])
    # What lies between the two is fused by inductor, and rounds elsewhere.
    assert (gated.int() - expected[1].int()).abs().max() <= 1
    if native.available():
        module.scale.data[1] = 0.5  # the graph reads buffers where they lie
        assert torch.equal(compiled(*inputs)[0], module(*inputs)[0])
