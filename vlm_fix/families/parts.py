"""Where the parts of a model are."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlm_fix.arch import Family
from vlm_fix.errors import VlmFixError


def get_part(model: Any, path: str) -> Any:
    """`model.language_model` -> the module; an empty path is the model itself."""
    for name in path.split(".") if path else ():
        model = getattr(model, name)
    return model


def language_head(model: Any, family: Family) -> Any:
    """The projection of hidden states on the vocabulary."""
    return get_part(model, family.head)


def find_vision_blocks(model: Any, family: Family) -> list[Any]:
    """The transformer blocks of the vision tower, in order; none in a convolutional one."""
    tower = get_part(model, family.vision)
    for module in tower.modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and any(hasattr(module[0], name) for name in ("self_attn", "attn", "attention"))
        ):
            return list(module)
    return []


def vision_blocks(model: Any, family: Family) -> list[Any]:
    """The same for those who cannot do without: VlmFixError where there are none."""
    if blocks := find_vision_blocks(model, family):
        return blocks
    raise VlmFixError(f"the vision tower of {type(model).__name__} has no transformer blocks (it is convolutional).")


def attention_modules(language: Any) -> dict[int, Any]:
    """The self-attention of each layer that has one: a hybrid decoder's linear-attention or convolution layers do not."""
    return {i: layer.self_attn for i, layer in enumerate(language.layers) if hasattr(layer, "self_attn")}


def video_token_id(model: Any) -> int:
    """The id of the tokens that show a video; -1 without any."""
    found = getattr(model.config, "video_token_id", None)
    return -1 if found is None else int(found)


def final_norm(language: Any) -> Any:
    """The norm before the language head; LFM2 has another name for it."""
    return language.norm if hasattr(language, "norm") else language.embedding_norm


def output_projection(attn: Any) -> Any:
    """The projection of self-attention that joins its heads; LFM2 calls it otherwise than all others."""
    for name in ("o_proj", "out_proj"):
        if hasattr(attn, name):
            return getattr(attn, name)
    raise VlmFixError(f"no output projection was found in {type(attn).__name__}.")


def image_token_ids(model: Any, family: Family) -> list[int]:
    return [i for name in family.image_tokens if (i := getattr(model.config, name, None)) is not None]
