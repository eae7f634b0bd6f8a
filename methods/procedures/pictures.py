"""Regions of an image, and prompts that show further images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import max_pool2d

from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.families import image_cells, image_token_ids
from vlm_fix.packing import by_token
from vlm_fix.pruning.shrink import resize, to_image, to_patches

ONE_RUN = ("pixels", "grid_thw", "sizes", "placed", "spatial", "navit")
"""`Family.cells` of models whose image is one run of tokens, each of which shows a patch: no tiles, no resampler."""


def image_blocks(call: Call) -> list[list[tuple[int, int]]]:
    """Per row of the batch, the columns [first, last) of each image of its prompt, the markers around it included.

    Raises VlmFixError where the image tokens do not fit the images.
    """
    ids, config = call.inputs["input_ids"], call.model.config
    tokens = torch.tensor(image_token_ids(call.model, call.family), device=ids.device)
    shown = torch.isin(ids, tokens)
    cells = image_cells(call.model, call.family, {**call.inputs, "input_ids": ids[shown][None]})
    ends = iter([int(grid.max()) + 1 for grid in cells])  # in the image tokens of the whole batch
    start, end = (
        getattr(config, f"vision_{side}_token_id", getattr(config, f"image_{side}_token_id", None))
        for side in ("start", "end")
    )
    rows, passed = list[list[tuple[int, int]]](), 0
    for row, image in zip(ids.tolist(), shown, strict=True):
        found, places = list[tuple[int, int]](), image.nonzero()[:, 0].tolist()
        while places:
            count = next(ends) - passed
            first, last, places, passed = places[0], places[count - 1] + 1, places[count:], passed + count
            found.append((first - (row[:first][-1:] == [start]), last + (row[last : last + 1] == [end])))
        rows.append(found)
    return rows


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
    ids = call.inputs["input_ids"]
    shown = torch.isin(ids, torch.tensor(image_token_ids(call.model, call.family), device=ids.device))
    cells = image_cells(call.model, call.family, {**call.inputs, "input_ids": ids[shown][None]})
    for x, (_, h, w), tokens in zip(pixels.split(grids.prod(-1).tolist()), grids.tolist(), cells, strict=True):
        merge = w // tokens.shape[1] if x.dim() == 2 else 1  # Kimi's patches are in reading order

        def pack(y: torch.Tensor, x: torch.Tensor = x, merge: int = merge) -> torch.Tensor:
            return to_patches(y, merge, patch).view_as(x)

        found.append((to_image(x, (h // merge, w // merge), merge, patch), pack))
    return found


def zoomed(image: torch.Tensor, left: int, top: int, right: int, bottom: int) -> torch.Tensor:
    """A part of an image [C, H, W], in pixels, enlarged (bicubic) to the image's size."""
    return resize(image[None, :, top:bottom, left:right], (image.shape[1], image.shape[2]))[0]


def with_images_after(call: Call, further: Sequence[Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The same prompt with further images of its size right after each image, left-padded again.

    further: for each image of the batch those that are put in, like its part of pixel_values. Their tokens, and the markers
    around them, repeat those of the image before. Raises VlmFixError where the image tokens do not fit the images.
    """
    ids, grids, counts = call.inputs["input_ids"], call.inputs.get("image_grid_thw"), iter(map(len, further))
    rows = []
    for blocks, seen in zip(image_blocks(call), call.inputs["attention_mask"].bool(), strict=True):
        columns, done = list[int](), 0
        for first, last in blocks:
            columns, done = [*columns, *range(done, last), *(list(range(first, last)) * next(counts))], last
        index = torch.tensor([*columns, *range(done, ids.shape[1])], device=ids.device)
        rows.append(index[seen[index]])
    width = max(map(len, rows))
    index = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=-1) for row in rows])
    new = dict(call.inputs)
    for name in by_token(new):
        new[name] = new[name].gather(1, index.clamp(min=0)).masked_fill(index < 0, 0)
    for name in ("image_grid_thw", "image_merge_sizes"):
        if name in new:
            new[name] = new[name].repeat_interleave(torch.tensor([1 + len(f) for f in further]).to(ids.device), dim=0)
    pixels = call.inputs["pixel_values"]
    parts = pixels.split([1] * len(pixels) if grids is None else grids.prod(dim=-1).tolist())
    return {
        **new,
        "pixel_values": torch.cat([x for own, more in zip(parts, further, strict=True) for x in (own, *more)]),
    }


def apart(call: Call) -> dict[str, torch.Tensor]:
    """A prompt for each image of the batch: its own without the other images, left-padded."""
    rows = []
    for row, blocks in enumerate(image_blocks(call)):
        shown = call.inputs["attention_mask"][row].bool().tolist()
        for own in blocks:
            others = {column for block in blocks if block != own for column in range(*block)}
            rows.append((row, [column for column, real in enumerate(shown) if real and column not in others]))
    width, new = max(len(columns) for _, columns in rows), dict(call.inputs)
    for name in by_token(call.inputs):
        cut = [call.inputs[name][row][columns] for row, columns in rows]
        new[name] = torch.stack([torch.nn.functional.pad(x, (width - len(x), 0)) for x in cut])
    return new


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
    ids, patch, made = call.inputs["input_ids"], call.model.config.vision_config.patch_size, []
    shown = torch.isin(ids, torch.tensor(image_token_ids(call.model, call.family), device=ids.device))
    maps = image_cells(call.model, call.family, {**call.inputs, "input_ids": ids[shown][None]})
    for x, at, (_, h, w) in zip(pixels.split(grids.prod(dim=-1).tolist()), maps, grids.tolist(), strict=True):
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


def in_order(call: Call, blocks: list[list[tuple[int, int]]], orders: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The same prompt with the images of row i in `orders[i]`, their tokens and markers moved; text stays between them.

    blocks: `image_blocks(call)`.
    """
    ids, grids, rows, images = call.inputs["input_ids"], call.inputs.get("image_grid_thw"), [], list[int]()
    for spans, order in zip(blocks, orders, strict=True):
        columns, done, passed = list[int](), 0, len(images)
        for (first, last), other in zip(spans, order, strict=True):
            columns, done = [*columns, *range(done, first), *range(*spans[other])], last
            images.append(passed + other)
        rows.append([*columns, *range(done, ids.shape[1])])
    index, new = torch.tensor(rows, device=ids.device), dict(call.inputs)
    for name in by_token(new):
        new[name] = new[name].gather(1, index)
    for name in ("image_grid_thw", "image_merge_sizes"):
        if name in new:
            new[name] = new[name][images]
    pixels = call.inputs["pixel_values"]
    parts = pixels.split([1] * len(pixels) if grids is None else grids.prod(dim=-1).tolist())
    return {**new, "pixel_values": torch.cat([parts[i] for i in images])}


def labelled(mask: torch.Tensor) -> torch.Tensor:
    """[H, W] bool -> the number of each pixel's region (its largest flat index + 1); 0 outside."""
    new, labels = torch.arange(1, mask.numel() + 1).view(mask.shape) * mask, None
    while labels is None or not torch.equal(new, labels):
        labels = new
        near = max_pool2d(labels.double()[None], 3, stride=1, padding=1)[0].long() * mask
        to = torch.cat([near.new_zeros(1), near.flatten()]).scatter_reduce(0, labels.flatten(), near.flatten(), "amax")
        new = to[to[near]]  # numbers name pixels: all that bear one follow it, two jumps at a time
    return labels
