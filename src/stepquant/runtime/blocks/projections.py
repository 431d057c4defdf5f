"""The norm and projections around the transformer blocks of diffusers' UNets, on codes."""

from __future__ import annotations

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from stepquant.runtime.blocks.eligibility import (
    follows_gradient,
    is_encodable,
    untouched,
    why_no_codes,
)
from stepquant.runtime.layers.straight_through import wants_gradient
from stepquant.runtime.ops import fused
from stepquant.runtime.ops.grids import Output
from stepquant.support.refusal import Refusal


class FastTransformer2DModel(Transformer2DModel):
    """`Transformer2DModel` on codes.

    The input side fuses norm and rounding into one pass; the output side needs no layout copy.
    """

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        """Tokens `[B, H * W, inner_dim]` of an image `[B, C, H, W]`, and diffusers' `inner_dim`."""
        x, norm, project = hidden_states, self.norm, self.proj_in
        plain = isinstance(norm, nn.GroupNorm) and untouched(norm)
        if not (_on_codes(project, x) and plain) or follows_gradient(norm, x):
            return super()._operate_on_continuous_inputs(x)
        prepared = project.prepared()
        outputs = [Output(0, x.shape[1], prepared.grid(), (0, 0))]
        (code,) = fused.group_norm_encode(
            (x,), None, norm.num_groups, norm.weight, norm.bias, norm.eps, "none", outputs
        )
        if self.use_linear_projection:
            y = prepared.run([_tokens(code)], dtype=x.dtype)
        else:
            y = _tokens(prepared.run([code], dtype=x.dtype))
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
        """The image `[B, C, H, W]` of tokens `[B, H * W, inner_dim]`, plus `residual`."""
        x, project = hidden_states, self.proj_out
        if not _on_codes(project, x) or wants_gradient(x, residual):
            return super()._get_output_for_continuous_inputs(
                x, residual, batch_size, height, width, inner_dim
            )
        prepared = project.prepared()
        if self.use_linear_projection:
            y = prepared.run(prepared.encode(x), _tokens(residual), residual.dtype)
            return _image(y, height, width)
        code = prepared.encode(_image(x, height, width))
        return prepared.run(code, residual, residual.dtype)

    def why_plain(self) -> Refusal | None:
        """Why one of the projections runs diffusers' code for every input, or None."""
        layers = [why_no_codes(each, 1) for each in (self.proj_in, self.proj_out)]
        return layers[0] or layers[1]


def _on_codes(layer: nn.Module, x: Tensor) -> bool:
    return is_encodable(x) and why_no_codes(layer, parts=1) is None


def _tokens(image: Tensor) -> Tensor:
    """`[B, C, H, W]`, channels last, as `[B, H * W, C]`."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _image(tokens: Tensor, height: int, width: int) -> Tensor:
    """`[B, H * W, C]` as `[B, C, H, W]`, channels last."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
