"""Prompts that show further images, or their images apart or in another order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlm_fix.call import Call
from vlm_fix.families import image_token_ids
from vlm_fix.packing import by_token

from .pixels import cells_of

ONE_RUN = ("pixels", "grid_thw", "sizes", "placed", "spatial", "navit")
"""`Family.cells` of models whose image is one run of tokens, each of which shows a patch: no tiles, no resampler."""


def image_blocks(call: Call) -> list[list[tuple[int, int]]]:
    """Per row of the batch, the columns [first, last) of each image of its prompt, the markers around it included.

    Raises VlmFixError where the image tokens do not fit the images.
    """
    ids, config = call.inputs["input_ids"], call.model.config
    tokens = torch.tensor(image_token_ids(call.model, call.family), device=ids.device)
    shown = torch.isin(ids, tokens)
    ends = iter([int(grid.max()) + 1 for grid in cells_of(call)])  # in the image tokens of the whole batch
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
