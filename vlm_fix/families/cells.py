"""Where an image's tokens lie in the image: which token of a prompt shows which patch."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from vlm_fix.arch import Family
from vlm_fix.errors import VlmFixError

from .parts import get_part, image_token_ids


def image_cells(model: Any, family: Family, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Per image of one prompt, [h, w]: which of the prompt's image tokens shows each patch.

    Where a model cuts an image into tiles of a fixed size, each tile counts as an image (a thumbnail of the whole is
    among them); LLaVA-NeXT and OneVision give the whole image first and then all tiles in one grid, newlines left out.
    """
    if family.cells == "none":
        raise VlmFixError(
            f"a resampler makes the image tokens of {family.name} models: none of them shows a certain patch."
        )
    ids, config = inputs["input_ids"], model.config
    tokens = torch.tensor(image_token_ids(model, family)).to(ids)
    visual = torch.isin(ids[0], tokens).cpu()
    count, pixels = int(visual.sum()), inputs.get("pixel_values")
    if family.cells == "grid_thw" and inputs.get("image_grid_thw") is not None:
        grids = inputs["image_grid_thw"].tolist()
        merges = _merges(config, inputs, "image", len(grids))
        cells = _rectangles([(t * h // m, w // m) for (t, h, w), m in zip(grids, merges, strict=True)])
    elif family.cells == "placed" and inputs.get("image_position_ids") is not None:  # (x, y) of each patch, -1: padding
        ends = inputs["image_position_ids"].amax(dim=1) + 1
        pool = config.vision_config.pooling_kernel_size
        cells = _rectangles([(h // pool, w // pool) for w, h in ends.tolist()])
    elif family.cells == "navit" and inputs.get("target_sizes") is not None:
        size = 4 if config.downsample_mode != "4x" else 2
        cells = _rectangles([(h // size, w // size) for h, w in inputs["target_sizes"].tolist()])
    elif (
        family.cells == "grids" and inputs.get("image_grids") is not None
    ):  # the whole image, then its crops in one grid
        cells = _rectangles([(h, w) for g in inputs["image_grids"].tolist() for h, w in (g[:2], g[2:]) if h * w])
    elif family.cells == "spatial" and inputs.get("spatial_shapes") is not None:
        size = config.downsample_factor
        cells = _rectangles([(h // size, w // size) for h, w in inputs["spatial_shapes"].tolist()])
    elif family.cells == "sizes" and inputs.get("image_sizes") is not None:
        size = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
        cells = _rectangles([(h // size, w // size) for h, w in inputs["image_sizes"].tolist()])
    elif family.cells == "anyres" and inputs.get("image_sizes") is not None:
        cells = _anyres(get_part(model, family.base), inputs)
    elif pixels is not None and family.cells in ("pixels", "tiles"):
        images = pixels.flatten(0, -4)
        if pixels.dim() == 5:
            images = images[(images != 0).flatten(1).any(dim=1)]  # Idefics pads with blank images
        each = count // max(len(images), 1)
        if family.cells == "pixels":
            size = config.vision_config.patch_size
            patch = size if isinstance(size, int) else size[0]
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


def split_pixels(inputs: dict[str, Any], pixels: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """`pixels`, laid out as the prompts' pixel_values, image by image (or tile by tile), and the dimension they lie along."""
    grid, sizes = inputs.get("image_grid_thw"), inputs.get("target_sizes")
    if sizes is not None:  # MiniCPM-V: patches side by side in one long row
        return list(pixels.split((sizes.prod(dim=-1) * pixels.shape[-2]).tolist(), dim=3)), 3
    return list(pixels.split(1) if grid is None else pixels.split(grid.prod(dim=-1).tolist())), 0


def visual_cells(model: Any, family: Family, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """`image_cells`, and [h, w] of each frame (two frames, where a model merges them) of videos, in the prompt's order.

    Empty where the image tokens show no certain patch.
    """
    if family.cells == "none":
        return []
    if inputs.get("pixel_values_videos") is None:
        return image_cells(model, family, inputs)
    ids, types = inputs["input_ids"], inputs.get("mm_token_type_ids")
    moving = (ids == getattr(model.config, "video_token_id", -1) if types is None else types == 2)[0]
    video = moving[torch.isin(ids[0], torch.tensor(image_token_ids(model, family)).to(ids))].cpu()
    if family.cells == "grid_thw" and inputs.get("video_grid_thw") is not None:
        grids = inputs["video_grid_thw"].tolist()
        merges = _merges(model.config, inputs, "video", len(grids))
        found = _rectangles([(h // m, w // m) for (t, h, w), m in zip(grids, merges, strict=True) for _ in range(t)])
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


def _merges(config: Any, inputs: dict[str, Any], what: str, count: int) -> list[int]:
    """Patches along one side of a token, of each image or video."""
    given, vision = inputs.get(f"{what}_merge_sizes"), config.vision_config
    if given is not None:
        return given.tolist()
    return [getattr(vision, "spatial_merge_size", None) or vision.merge_kernel_size[0]] * count


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
