"""What diffusers' UNets put around their transformer blocks, on codes."""

from __future__ import annotations

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from stepquant.runtime.layers import codes
from stepquant.runtime.ops import fused
from stepquant.runtime.ops.grids import Output


class FastTransformer2DModel(Transformer2DModel):
    """Norm and rounding in one pass on the way in; on the way out no copy to another layout."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        """`[B, C, H, W]` to `[B, H * W, inner_dim]`, and the channels to come back to."""
        x, norm, project = hidden_states, self.norm, self.proj_in
        plain = isinstance(norm, nn.GroupNorm) and codes.untouched(norm)
        if not (_on_codes(project, x) and plain):
            return super()._operate_on_continuous_inputs(x)
        outputs = [Output(0, x.shape[1], codes.grid_of(project), (0, 0))]
        (code,) = fused.group_norm_encode(
            (x,), None, norm.num_groups, norm.weight, norm.bias, norm.eps, "none", outputs
        )
        if self.use_linear_projection:
            y = codes.run(project, [_tokens(code)], dtype=x.dtype)
        else:
            y = _tokens(codes.run(project, [code], dtype=x.dtype))
        return y.to(x.dtype), x.shape[1] if self.use_linear_projection else y.shape[-1]

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        """`[B, H * W, inner_dim]` and the block's input to `[B, C, H, W]`."""
        x, project = hidden_states, self.proj_out
        if not _on_codes(project, x):
            return super()._get_output_for_continuous_inputs(
                x, residual, batch_size, height, width, inner_dim
            )
        if self.use_linear_projection:
            y = codes.run(project, codes.encode(project, x), _tokens(residual), residual.dtype)
            return _image(y, height, width)
        code = codes.encode(project, _image(x, height, width))
        return codes.run(project, code, residual, residual.dtype)

    def why_plain(self) -> str | None:
        """Why one of the projections runs as in diffusers whatever it is called with, or None."""
        layers = [codes.why_not_from_outside(each, 1) for each in (self.proj_in, self.proj_out)]
        return layers[0] or layers[1]


def _on_codes(layer: nn.Module, x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in codes.FLOATS
        and codes.why_not_from_outside(layer, parts=1) is None
    )


def _tokens(image: Tensor) -> Tensor:
    """`[B, C, H, W]`, channels last, as `[B, H * W, C]`."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _image(tokens: Tensor, height: int, width: int) -> Tensor:
    """`[B, H * W, C]` as `[B, C, H, W]`, channels last."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
