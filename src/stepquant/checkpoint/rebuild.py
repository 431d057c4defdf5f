"""Whether the config of a model describes all of it, so that a load builds the same modules."""

from __future__ import annotations

from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import nn

from stepquant.models.attention_processor import PRODUCTS
from stepquant.models.rewriting import class_for, name_before, names_of_rewritten


def why_not_rebuilt(model: nn.Module) -> str | None:
    """Return why a load could not build `model`, float or packed, as a sentence, or None.

    Some methods of diffusers add modules that no config mentions, such as `fuse_qkv_projections`.
    The user's code builds a model of another library.
    """
    if not isinstance(model, ModelMixin):
        return None
    plain = {key: value for key, value in model.config.items() if key != "quantization_config"}
    with init_empty_weights():
        built = dict(type(model).from_config(plain).named_modules())  # type: ignore[attr-defined]
    owners = {
        name_before(model, name.rpartition(".")[0].removesuffix(PRODUCTS))
        for name in model.state_dict()
    }
    extra = sorted(owners - set(built))
    if extra:
        return (
            f"{type(model).__name__} has the module '{extra[0]}', which its config does not "
            "describe: expected a model as from_config builds it, because nothing else can be "
            "loaded again; take the change back (unfuse_qkv_projections, say) and quantize it then"
        )
    for name in names_of_rewritten(model):
        if class_for(built[name]) is None:
            return (
                f"the convolution '{name}' of {type(model).__name__} has padding or groups that "
                "the model's config does not describe: expected a model as from_config builds it, "
                "because nothing else can be loaded again; take the change back"
            )
    return None
