"""One place reads the names of backends."""

from __future__ import annotations

import pytest

from stepquant.engines.target import Engine, Target
from stepquant.runtime.kernels import Backend, registered_kernels


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("openvino", Target(Engine.OPENVINO, device="CPU")),
        ("openvino:", Target(Engine.OPENVINO, device="CPU")),
        ("openvino:GPU", Target(Engine.OPENVINO, device="GPU")),
        ("fastest", Target(Engine.FASTEST)),
        ("auto", Target(Engine.LAYERS, "auto")),
        ("onednn", Target(Engine.LAYERS, "onednn")),
        (Backend.ONEDNN, Target(Engine.LAYERS, "onednn")),
        ("theirs", Target(Engine.LAYERS, "theirs")),
    ],
)
def test_backends_are_told_apart(backend: str, expected: Target) -> None:
    assert Target.parse(backend) == expected


def test_a_backend_is_its_name() -> None:
    assert [str(each) for each in Backend] == ["auto", *registered_kernels()]
    assert f"{Backend.INT_MM}" == "int_mm" == Backend.INT_MM
    assert Backend("onednn") is Backend.ONEDNN and {Backend.NATIVE: 1}["native"] == 1
