"""Capture of a denoiser's forward pass, and its replay without Python.

One call of a packed denoiser runs hundreds of kernels of a few microseconds each. At small batch
sizes the Python between the kernels takes as long as the kernels themselves. Shapes stay the
same from step to step, so the recorder notes which kernel ran on which memory, and a replay runs
the same kernels on the same memory.

- `memory`: buffers for intermediate values, reused as soon as a value dies.
- `recorder`: captures the kernels and operators of one call.
- `state`: what must stay unchanged for a recording to remain valid.
- `denoiser`: `RecordedDenoiser`, which captures and replays calls, and `recorded`, which wraps a
  denoiser if its calls can be captured.
"""

from stepquant.engines.captured_calls.denoiser import RecordedDenoiser, recorded

__all__ = ["RecordedDenoiser", "recorded"]
