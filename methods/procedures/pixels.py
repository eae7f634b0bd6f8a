"""The pixels of a call's images: each by itself, parts of it, and regions of a mask."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.functional import max_pool2d

from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.families import image_cells, image_token_ids
from vlm_fix.pruning.shrink import resize, to_image, to_patches


def cells_of(call: Call) -> list[torch.Tensor]:
    """`image_cells` of every image of the batch, in order: its places among the image tokens of all rows."""
    ids = call.inputs["input_ids"]
    shown = torch.isin(ids, torch.tensor(image_token_ids(call.model, call.family), device=ids.device))
    return image_cells(call.model, call.family, {**call.inputs, "input_ids": ids[shown][None]})


def images_of(call: Call, name: str) -> list[tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]:
    """Each image of the batch as pixels [C, H, W], or [C frames, H, W], and what packs such an image like pixel_values.

    Raises VlmFixError, with the method's name, for tiles and videos.
    """
    pixels, kind = call.inputs.get("pixel_values"), call.family.cells
    grids = call.inputs.get("image_grid_thw")
    if pixels is None or kind not in ("pixels", "grid_thw") or (grids is not None and any(grids[:, 0] != 1)):
        raise VlmFixError(
            f"{name} needs pixel_values of whole images, as llava gets them, no tiles or videos ({call.family.name})."
        )
    if grids is None:
        return [(x, lambda y: y[None]) for x in pixels]
    found: list[tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]] = []
    patch = call.model.config.vision_config.patch_size
    for x, (_, h, w), tokens in zip(pixels.split(grids.prod(-1).tolist()), grids.tolist(), cells_of(call), strict=True):
        merge = w // tokens.shape[1] if x.dim() == 2 else 1  # Kimi's patches are in reading order

        def pack(y: torch.Tensor, x: torch.Tensor = x, merge: int = merge) -> torch.Tensor:
            return to_patches(y, merge, patch).view_as(x)

        found.append((to_image(x, (h // merge, w // merge), merge, patch), pack))
    return found


def zoomed(image: torch.Tensor, left: int, top: int, right: int, bottom: int) -> torch.Tensor:
    """A part of an image [C, H, W], in pixels, enlarged (bicubic) to the image's size."""
    return resize(image[None, :, top:bottom, left:right], (image.shape[1], image.shape[2]))[0]


def changed(call: Call, change: Callable[[torch.Tensor], torch.Tensor], name: str) -> torch.Tensor:
    """pixel_values with `change` applied to every image: [T, 3, H, W] float32 on the CPU, T copies of it -> the same shape.

    An image that the processor cuts into tiles is changed tile by tile. VlmFixError, which begins with `name`, where the
    pixels are no rows of an image.
    """
    pixels, grids, cells = call.inputs.get("pixel_values"), call.inputs.get("image_grid_thw"), call.family.cells
    packed = cells == "grid_thw" and grids is not None and bool((grids[:, 0] == 1).all())
    if pixels is None or not (packed or (cells in ("pixels", "tiles", "anyres") and pixels.dim() in (4, 5))):
        raise VlmFixError(
            f"{name} needs pixel_values of whole images or square tiles; {call.family.name} has none in this call."
        )

    def moved(x: torch.Tensor) -> torch.Tensor:
        return change(x.detach().float().cpu().contiguous()).to(x)

    if not packed or grids is None:
        new: torch.Tensor = call.with_pixels(lambda x: torch.cat([moved(i) for i in x.split(1)]))["pixel_values"]
        return new
    patch, made = call.model.config.vision_config.patch_size, []
    for x, at, (_, h, w) in zip(pixels.split(grids.prod(dim=-1).tolist()), cells_of(call), grids.tolist(), strict=True):
        merge = w // at.shape[1] if x.dim() == 2 else 1  # Kimi's patches are in reading order
        image = to_image(x, (h // merge, w // merge), merge, patch)
        frames = moved(image.unflatten(0, (3, -1)).transpose(0, 1))
        made.append(to_patches(frames.transpose(0, 1).flatten(0, 1), merge, patch).view_as(x))
    return torch.cat(made)


@functools.lru_cache(maxsize=16)
def normalisation(path: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of each channel by the image processor of a checkpoint; None without one."""
    from transformers import AutoImageProcessor, AutoProcessor

    try:
        try:
            how = AutoImageProcessor.from_pretrained(path, local_files_only=True)
        except ImportError:  # transformers 5.17 asks for torchvision here, and not there
            how = AutoProcessor.from_pretrained(path, local_files_only=True).image_processor
    except (OSError, ValueError, ImportError):
        return None
    return (tuple(how.image_mean), tuple(how.image_std)) if how.do_normalize else ((0.0,) * 3, (1.0,) * 3)


def labelled(mask: torch.Tensor) -> torch.Tensor:
    """[H, W] bool -> the number of each pixel's region (its largest flat index + 1); 0 outside."""
    new, labels = torch.arange(1, mask.numel() + 1).view(mask.shape) * mask, None
    while labels is None or not torch.equal(new, labels):
        labels = new
        near = max_pool2d(labels.double()[None], 3, stride=1, padding=1)[0].long() * mask
        to = torch.cat([near.new_zeros(1), near.flatten()]).scatter_reduce(0, labels.flatten(), near.flatten(), "amax")
        new = to[to[near]]  # numbers name pixels: all that bear one follow it, two jumps at a time
    return labels
