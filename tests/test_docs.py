"""Code of the documentation, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from plain_denoiser import SHAPE, Denoiser
from quantize_runs import FAST
from stepquant import api

MARK = "<!-- run by tests/test_docs.py -->\n```python\n"
DOCS = Path(__file__).parents[1] / "docs"


def test_the_ten_lines_for_a_module_of_ones_own_run(tmp_path, monkeypatch, one_thread):
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    (code,) = re.findall(re.escape(MARK) + r"(.*?)```", text, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    monkeypatch.chdir(tmp_path)
    quantize = api.quantize
    # The same call, with as little training as there can be.
    monkeypatch.setattr(api, "quantize", lambda *a, **k: quantize(*a, **k, settings=FAST))
    names = {"Denoiser": Denoiser}
    exec(code, names)
    assert names["images"].shape == (16, *SHAPE)
    again = api.load_module(Denoiser(), "packed")
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        assert torch.equal(again(x, torch.tensor(500)), names["packed"](x, torch.tensor(500)))
