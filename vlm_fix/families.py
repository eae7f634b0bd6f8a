"""One table: model family -> where its parts are. Everything else asks here and never names a model class."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import VlmFixError


@dataclass(frozen=True)
class Family:
    """Attribute paths are relative to the `...ForConditionalGeneration` model.

    `base` owns get_placeholder_mask and the text model; `encoder` names the way encoder attention is recomputed
    (pruning/encoder.py), None: pruners are refused; `cells` how image tokens lie in the image (see `image_cells`);
    `mrope` families have 3-D positions made by `base.get_rope_index`; others count positions from `first_position`. Where
    the prompt is not `causal`, all its rows see its last one.
    """

    name: str
    model_types: tuple[str, ...]
    base: str = "model"
    language: str = "model.language_model"
    vision: str = "model.vision_tower"
    encoder: str | None = None
    image_tokens: tuple[str, ...] = ("image_token_id",)
    mrope: bool = False
    first_position: int = 0
    causal: bool = True
    cells: str = "tiles"
    tested: str = "random weights"


VIDEO = ("image_token_id", "video_token_id")
FAMILIES = (
    Family("llava", ("llava",), encoder="clip", cells="pixels", tested="picto-llava; random weights (CLIP + Llama)"),
    Family(
        "qwen2_5_vl",
        ("qwen2_5_vl",),
        vision="model.visual",
        encoder="qwen2_5_vl",
        image_tokens=VIDEO,
        mrope=True,
        cells="grid_thw",
    ),
    Family("qwen2_vl", ("qwen2_vl",), vision="model.visual", image_tokens=VIDEO, mrope=True, cells="grid_thw"),
    Family("qwen3_vl", ("qwen3_vl",), vision="model.visual", image_tokens=VIDEO, mrope=True, cells="grid_thw"),
    Family("glm4v", ("glm4v",), vision="model.visual", image_tokens=VIDEO, mrope=True, cells="grid_thw"),
    Family("vipllava", ("vipllava",), cells="pixels"),
    Family("llava_next", ("llava_next",), encoder="clip", cells="anyres"),
    Family("llava_onevision", ("llava_onevision",), encoder="clip", image_tokens=VIDEO, cells="anyres"),
    Family("internvl", ("internvl",)),
    Family("gemma3", ("gemma3",)),
    Family("paligemma", ("paligemma",), first_position=1, causal=False),
    Family("idefics3", ("idefics3",), language="model.text_model", vision="model.vision_model"),
    Family("smolvlm", ("smolvlm",), language="model.text_model", vision="model.vision_model"),
    Family("mistral3", ("mistral3",), cells="sizes"),
    Family("aya_vision", ("aya_vision",)),
    Family("cohere2_vision", ("cohere2_vision",)),
)
REFUSED = {
    "mllama": "it reads images through cross-attention layers, so no column of its self-attention shows the image",
    "blip-2": "its language model is called on its own, from inside generate, with embeddings in place of tokens",
    "instructblip": "its language model is called on its own, from inside generate, with embeddings in place of tokens",
    "qwen3_5": "most of its layers are linear attention, which has no weights to edit",
    "lfm2_vl": "most of its layers are convolutions, which have no weights to edit",
    "llama4": "its chunked attention masks are not understood here",
    "florence2": "it is an encoder-decoder",
    "kosmos-2": "it does not use transformers' attention interface",
}


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
    if model_type in REFUSED:
        raise VlmFixError(
            f"models of type {model_type!r} are not supported: {REFUSED[model_type]}; `vlm-fix models` lists those that are."
        )
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
            and any(hasattr(module[0], name) for name in ("self_attn", "attn", "attention"))
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
    flat = (mask.long().cumsum(-1) - 1).clamp(min=0) + family.first_position
    if not family.mrope:
        return flat, flat[:, -1] + 1
    if inputs.get("image_grid_thw") is None and inputs.get("video_grid_thw") is None:
        return flat.expand(3, -1, -1), flat[:, -1] + 1
    base = get_part(model, family.base)
    known = inspect.signature(base.get_rope_index).parameters
    positions, _ = base.get_rope_index(ids, **{k: v for k, v in inputs.items() if k in known and k != "input_ids"})
    return positions, positions.amax(dim=(0, 2)) + 1


def image_cells(model: Any, family: Family, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Per image of one prompt, [h, w]: which of the prompt's image tokens shows each patch.

    Where a model cuts an image into tiles of a fixed size, each tile counts as an image (a thumbnail of the whole is
    among them); LLaVA-NeXT and OneVision give the whole image first and then all tiles in one grid, newlines left out.
    """
    ids, config = inputs["input_ids"], model.config
    tokens = torch.tensor(image_token_ids(model, family)).to(ids)
    visual = torch.isin(ids[0], tokens).cpu()
    count, pixels = int(visual.sum()), inputs.get("pixel_values")
    if family.cells == "grid_thw" and inputs.get("image_grid_thw") is not None:
        merge = config.vision_config.spatial_merge_size
        cells = _rectangles([(t * h // merge, w // merge) for t, h, w in inputs["image_grid_thw"].tolist()])
    elif family.cells == "sizes" and inputs.get("image_sizes") is not None:
        size = config.vision_config.patch_size * config.spatial_merge_size
        cells = _rectangles([(h // size, w // size) for h, w in inputs["image_sizes"].tolist()])
    elif family.cells == "anyres" and inputs.get("image_sizes") is not None:
        cells = _anyres(get_part(model, family.base), inputs)
    elif pixels is not None and family.cells in ("pixels", "tiles"):
        size = config.vision_config.patch_size
        patch = size if isinstance(size, int) else size[0]
        images = pixels.flatten(0, -4)
        if pixels.dim() == 5:
            images = images[(images != 0).flatten(1).any(dim=1)]  # Idefics pads with blank images
        each = count // max(len(images), 1)
        if family.cells == "pixels":
            h, w = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        else:
            h = w = math.isqrt(each)
        cells = [
            torch.arange(each - h * w, each).view(h, w) + i * each for i in range(len(images))
        ]  # class token first
    else:
        cells = []
    if sum(c.numel() for c in cells) > count or not cells or int(cells[-1].max()) >= count:
        raise VlmFixError(
            f"the prompt holds {count} image tokens, which the images given with it do not explain; pass the processor's "
            "whole output (images, no video)."
        )
    return cells


def visual_cells(model: Any, family: Family, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """`image_cells`, and [h, w] of each frame (two frames, where a model merges them) of videos, in the prompt's order."""
    if inputs.get("pixel_values_videos") is None:
        return image_cells(model, family, inputs)
    ids, types = inputs["input_ids"], inputs.get("mm_token_type_ids")
    moving = (ids == getattr(model.config, "video_token_id", -1) if types is None else types == 2)[0]
    video = moving[torch.isin(ids[0], torch.tensor(image_token_ids(model, family)).to(ids))].cpu()
    if family.cells == "grid_thw" and inputs.get("video_grid_thw") is not None:
        merge = model.config.vision_config.spatial_merge_size
        grids = inputs["video_grid_thw"].tolist()
        found = _rectangles([(h // merge, w // merge) for t, h, w in grids for _ in range(t)])
    elif family.cells == "anyres":  # pooled 2 x 2, one newline at the end of a video
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        side = math.ceil(anyres_side(get_part(model, family.base)) / 2)
        found = [c + i for i in range(videos) for c in _rectangles([(side, side)] * frames, i * frames * side**2)]
    else:
        found = []
    if not found or int(found[-1].max()) >= int(video.sum()):
        raise VlmFixError(
            f"the prompt holds {int(video.sum())} video tokens, which the videos given with it do not explain; pass the "
            "processor's whole output."
        )
    places = [video.nonzero()[:, 0][c] for c in found]
    if not video.all():
        still = image_cells(model, family, {**inputs, "input_ids": ids[:, ~moving]})
        places += [(~video).nonzero()[:, 0][c] for c in still]
    return sorted(places, key=lambda c: int(c[0, 0]))


def _rectangles(sizes: list[tuple[int, int]], start: int = 0) -> list[torch.Tensor]:
    """Images of (h, w) tokens, one after the other from token `start` on."""
    cells = []
    for h, w in sizes:
        cells.append(torch.arange(start, start + h * w).view(h, w))
        start += h * w
    return cells


def _anyres(base: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Newlines in the packed image show where rows end."""
    cells, start = [], 0
    for index in anyres_index(base, inputs):
        side, ends = anyres_side(base), int((index == -1).sum())
        cells.append(torch.arange(start, start + side**2).view(side, side))
        if len(index) > side**2 + 1:
            cells.append(torch.arange(start + side**2, start + len(index)).view(ends, -1)[:, :-1])
        start += len(index)
    return cells


def anyres_side(base: Any) -> int:
    """Patches along one side of a crop."""
    return base.config.vision_config.image_size // base.config.vision_config.patch_size


def anyres_index(base: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Per image, for each of its tokens in the prompt: crop * patches + patch, -1 for a newline.

    Crop 0 is the whole image. The model's own packing, run on numbers in place of features, tells; where it resizes the
    packed image (LLaVA-OneVision beyond anyres_max) a token shows no single patch, and the index is -2.
    """
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, found, size = base.config, [], anyres_side(base) ** 2
    options = {"vision_aspect_ratio": config.vision_aspect_ratio} if hasattr(config, "vision_aspect_ratio") else {}
    if "vision_feature_select_strategy" in inspect.signature(base.pack_image_features).parameters:
        options["vision_feature_select_strategy"] = config.vision_feature_select_strategy
    several = inputs.get("batch_num_images")
    sizes = inputs["image_sizes"]
    cut = [True] * len(sizes) if several is None else [n == 1 for n in several.tolist() for _ in range(n)]
    for image, alone in zip(sizes, cut, strict=True):
        tiles = image_size_to_num_patches(image, config.image_grid_pinpoints, config.vision_config.image_size)
        numbers = torch.arange((tiles if alone else 1) * size, dtype=torch.float64).view(-1, size, 1)
        newline = torch.full((1,), -1, dtype=torch.float64)
        packed = base.pack_image_features([numbers], image[None], image_newline=newline, **options)[0][0][:, 0]
        if "vision_aspect_ratio" in options:
            whole = {**options, "vision_aspect_ratio": "anyres_max_1000000"}
            unresized = base.pack_image_features([numbers], image[None], image_newline=newline, **whole)[0][0]
            if len(unresized) != len(packed):
                newlines = packed == -1
                packed[size:] = -2
                packed[newlines] = -1
        found.append(packed.long())
    return found
