"""A denoiser's call recorded once and replayed without its Python.

A call of a packed denoiser is some hundred kernels of a few microseconds each, with as much Python
between them; at small batches that takes as long as the kernels. Shapes of a call do not change
from step to step, so everything but the numbers is the same: the recorder writes down which kernel
ran on which memory, and a replay runs the same kernels on the same memory again.

`memory`: the memory of the values between kernels, reused as they die. `recorder`: what writes a
call down. `state`: what has to be unchanged for a recording to be true. `denoiser`:
`RecordedDenoiser`, which takes calls, and `recorded`, which makes one where that works.
"""

from stepquant.engines.captured_calls.denoiser import RecordedDenoiser, recorded

__all__ = ["RecordedDenoiser", "recorded"]
