"""The attributes of `nn.Conv2d` for an integer conv, read from its spec."""

from __future__ import annotations

from stepquant.runtime.ops.layer_spec import LayerSpec


class WindowOfSpec:
    """The channels and the window of `spec` under `nn.Conv2d`'s names, which peft reads."""

    spec: LayerSpec
    groups = 1
    padding_mode = "zeros"

    @property
    def in_channels(self) -> int:
        """The number of in-channels."""
        return self.spec.in_channels

    @property
    def out_channels(self) -> int:
        """The number of out-channels."""
        return self.spec.out_channels

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Height and width of the kernel, in pixels."""
        return self.spec.kernel_size

    @property
    def stride(self) -> tuple[int, int]:
        """Vertical and horizontal distance between outputs, in pixels."""
        return self.spec.stride

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros above and below, and left and right, in pixels."""
        return self.spec.padding

    @property
    def dilation(self) -> tuple[int, int]:
        """Vertical and horizontal distance between the kernel's taps, in pixels."""
        return self.spec.dilation
