"""One table: model family -> where its parts are. Everything else asks here and never names a model class."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import VlmFixError


@dataclass(frozen=True)
class Family:
    """Attribute paths are relative to the `...ForConditionalGeneration` model.

    `base` owns get_placeholder_mask and the text model; `encoder` names the way encoder attention is recomputed
    (pruning/encoder.py); `mrope` families have 3-D positions made by `base.get_rope_index`.
    """

    name: str
    model_types: tuple[str, ...]
    base: str
    language: str
    vision: str
    encoder: str
    image_tokens: tuple[str, ...] = ("image_token_id",)
    mrope: bool = False
    tested: str = ""


FAMILIES = (
    Family(
        "llava",
        ("llava",),
        "model",
        "model.language_model",
        "model.vision_tower",
        "clip",
        tested="picto-llava; random weights (CLIP + Llama)",
    ),
    Family(
        "qwen2_5_vl",
        ("qwen2_5_vl",),
        "model",
        "model.language_model",
        "model.visual",
        "qwen2_5_vl",
        ("image_token_id", "video_token_id"),
        mrope=True,
        tested="random weights",
    ),
)


@dataclass(frozen=True)
class Arch:
    """Sizes of one model, from which methods take their defaults."""

    family: Family
    depth: int
    hidden: int
    heads: int
    vocab: int
    text_type: str
    vision_depth: int
    vision_last: int  # index of the last vision layer whose output reaches the projector
    vision_full: tuple[int, ...]  # vision layers with full (not windowed) attention


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face model; VlmFixError naming the supported ones otherwise."""
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    for family in FAMILIES:
        if model_type in family.model_types:
            if not hasattr(model, "generate") or not hasattr(model, "lm_head"):
                raise VlmFixError(
                    f"{type(model).__name__} has no language-model head; load it with AutoModelForImageTextToText."
                )
            return family
    raise VlmFixError(
        f"models of type {model_type!r} are not supported; supported: {', '.join(f.name for f in FAMILIES)} "
        "(`vlm-fix models`)."
    )


def get_part(model: Any, path: str) -> Any:
    """`model.language_model` -> the module."""
    for name in path.split("."):
        model = getattr(model, name)
    return model


def vision_blocks(model: Any, family: Family) -> list[Any]:
    """The transformer blocks of the vision tower, in order."""
    tower = get_part(model, family.vision)
    for module in tower.modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and (hasattr(module[0], "self_attn") or hasattr(module[0], "attn"))
        ):
            return list(module)
    raise VlmFixError(f"no transformer blocks were found in the vision tower of {type(model).__name__}.")


def arch_of(model: Any) -> Arch:
    """Sizes of `model`; raises VlmFixError for an unsupported family."""
    family, config = family_of(model), model.config
    text, depth = config.get_text_config(), len(vision_blocks(model, family))
    layer = getattr(config, "vision_feature_layer", None)
    last = depth - 1
    if isinstance(layer, int):  # hidden_states has depth + 1 entries; entry i is the output of block i - 1
        last = (layer + depth + 1 if layer < 0 else layer) - 1
    full = getattr(config.vision_config, "fullatt_block_indexes", None)
    return Arch(
        family,
        text.num_hidden_layers,
        text.hidden_size,
        text.num_attention_heads,
        text.vocab_size,
        text.model_type,
        depth,
        last,
        tuple(range(depth) if full is None else full),
    )


def image_token_ids(model: Any, family: Family) -> list[int]:
    return [i for name in family.image_tokens if (i := getattr(model.config, name, None)) is not None]


def prompt_positions(model: Any, family: Family, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids of a left-padded prompt, [B, L] or [3, B, L] for M-RoPE, and the next position of each row [B]."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    flat = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if not family.mrope:
        return flat, flat[:, -1] + 1
    if inputs.get("image_grid_thw") is None and inputs.get("video_grid_thw") is None:
        return flat.expand(3, -1, -1), flat[:, -1] + 1
    base = get_part(model, family.base)
    known = inspect.signature(base.get_rope_index).parameters
    positions, _ = base.get_rope_index(ids, **{k: v for k, v in inputs.items() if k in known and k != "input_ids"})
    return positions, positions.amax(dim=(0, 2)) + 1


def image_cells(model: Any, family: Family, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Per image of one prompt, [h, w]: which of the prompt's image tokens shows each patch (-1: none)."""
    count = int(
        torch.isin(inputs["input_ids"], torch.tensor(image_token_ids(model, family)).to(inputs["input_ids"])).sum()
    )
    grid, cells, start = inputs.get("image_grid_thw"), [], 0
    if grid is not None:
        merge = model.config.vision_config.spatial_merge_size
        sizes = [
            (int(t) * int(h) // merge, int(w) // merge) for t, h, w in grid
        ]  # frames of a video lie below each other
        extra = 0
    else:
        pixels, patch = inputs["pixel_values"], model.config.vision_config.patch_size
        sizes = [(pixels.shape[-2] // patch, pixels.shape[-1] // patch)] * len(pixels)
        extra = count // len(pixels) - sizes[0][0] * sizes[0][1]  # a class token, if the model keeps it
    for h, w in sizes:
        start += extra
        cells.append(torch.arange(start, start + h * w).view(h, w))
        start += h * w
    if start != count:
        raise VlmFixError(
            f"the prompt holds {count} image tokens, but its images give {start}; pass the images it was made with."
        )
    return cells
