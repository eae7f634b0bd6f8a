"""Dropping visual tokens before the language model, while generate's own bookkeeping stays at the full length.

A pre-hook on the language model slices the embeddings, positions and mask of the prompt; on later steps it cuts the
mask and renumbers the positions. The cache is shorter than generate believes, which it never looks at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from vlm_fix.errors import VlmFixError
from vlm_fix.families import anyres_index, anyres_side, get_part, video_token_id
from vlm_fix.packing import left_pack, pad_to
from vlm_fix.session import PAD, VISUAL, Session

from . import deepstack, shrink
from .columns import ImageColumns, Kept
from .encoder import ImageTokens, capture, in_prompt_order, unreadable
from .kinds import ImageShrinker, question_columns
from .merge import TokenMerger
from .pruners import Pruners


def check(pruners: Pruners) -> None:
    """Raise VlmFixError where the model's positions or vision tower do not go with the pruners."""
    host, pruner = pruners.host, pruners.pruner
    if pruner and host.family.mrope and pruner.positions == "compact":
        raise VlmFixError(
            f"{pruner.name}: positions=compact has no meaning for M-RoPE's 3-D positions; use positions=original."
        )
    if host.family.encoder is None and (pruner or pruners.encoder_layers):
        raise VlmFixError(unreadable(host.family, pruners.all[0].name))
    counts = isinstance(pruner, ImageShrinker) and pruner.keep is not None and pruner.keep > 1
    if pruner and counts and host.family.cells == "anyres":
        raise VlmFixError(
            f"{pruner.name}: {host.family.name} cuts images into crops; give keep as a share, such as keep=0.33."
        )


def install(pruners: Pruners) -> Iterator[Any]:
    """The hooks of the TokenPruner, and of what else needs to know which image a column shows."""
    host, pruner = pruners.host, pruners.pruner
    if isinstance(pruner, ImageShrinker):
        yield from shrink.install(host, pruner.shrink)
    elif host.family.encoder:
        tower = get_part(host.model, host.family.vision)
        yield from capture(host, tower, pruners.encoder_layers, flows=pruners.flows)

    def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        session = host.editing
        if session is None:
            return None
        if session.start == 0 and max(session.last_visual) >= 0:
            match(pruners, session)
            return (args, prune(pruners, session, kwargs)) if pruner else None
        if 0 < session.start < session.prompt_len and bool((session.types[:, session.start :] == VISUAL).any()):
            raise VlmFixError(
                f"{pruners.all[0].name} takes the whole prompt at once; do not feed its images in pieces."
            )
        return (args, follow(session, kwargs)) if session.kept else None

    def refuse(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("labels") is not None:
            raise VlmFixError(
                f"{pruners.all[0].name} drops tokens, so labels have no place: unwrap the model for a loss."
            )

    yield host.model.register_forward_pre_hook(refuse, with_kwargs=True)
    yield host.language.register_forward_pre_hook(hook, with_kwargs=True)


def prune(pruners: Pruners, session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The prompt's language-model inputs without the dropped tokens; unchanged if everything is kept."""
    types, embeds = session.types, kwargs["inputs_embeds"]
    keep, embeds = choose(pruners, session, types, embeds)
    assert pruners.pruner is not None
    if bool((keep | (types == PAD)).all()):
        return kwargs
    index, mask = left_pack(keep & (types != PAD))
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = ((types != PAD).long().cumsum(-1) - 1).clamp(min=0)
    default = "original" if pruners.host.family.mrope else "compact"
    if (pruners.pruner.positions or default) == "compact":
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    else:
        positions = positions.expand(*positions.shape[:-2], len(index), -1).gather(
            -1, index.expand(*positions.shape[:-2], *index.shape)
        )
    session.kept = Kept(mask.long(), positions[..., -1:], types.shape[1], index)
    session.prompt_len += index.shape[1] - types.shape[1]
    shown = session.part(ImageColumns)
    shown.images = shown.images.gather(1, index) * mask
    session.advance(0, torch.where(mask, types.gather(1, index), PAD).to(types.dtype))
    return {
        **kwargs,
        **deepstack.kept(kwargs, keep, index, mask),
        "inputs_embeds": embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1])),
        "position_ids": positions,
        "attention_mask": session.kept.mask,
    }


def follow(session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Later steps: the mask of what was kept plus the generated columns, and positions that go on from the prompt."""
    kept, step = session.kept, session.start - session.kept.mask.shape[1]
    positions = kept.last_position + 1 + step
    if session.length > 1:
        positions = positions + torch.arange(session.length, device=kept.mask.device)
    if (
        not session.padded and session.start >= session.prompt_len
    ):  # every column is seen: nobody has to look for padding
        return {**kwargs, "attention_mask": None, "position_ids": positions}
    mask, new = kwargs.get("attention_mask"), step + session.length
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:  # a static cache's come ready-made, for the whole prompt
        mask = None
    later = torch.ones_like(kept.mask[:, :1]).expand(-1, new) if mask is None else mask[:, kept.full_length :]
    return {**kwargs, "attention_mask": torch.cat([kept.mask, later.to(kept.mask)], dim=1), "position_ids": positions}


def match(pruners: Pruners, session: Session) -> None:
    """Find each image's columns: `ImageColumns` numbers them by row and holds what the tower saw.

    Where nobody reads the tower's crops, an image (or one of its tiles) is an unbroken run of image tokens.
    """
    call, types, family = session.call, session.types, pruners.host.family
    ids = call.inputs["input_ids"]  # None in a caller's own forward of embeddings
    ids = types.long() if ids is None else ids.to(types.device).repeat_interleave(len(types) // len(ids), dim=0)
    ids = pad_to(ids, types.shape[1])  # without a cache the answer is read again
    reads = pruners.pruner or pruners.encoder_layers
    if family.cells == "anyres" and reads:
        match_crops(pruners, session)
        return
    seen: list[Any] = call.vision
    sizes = [image.grid[0] * image.grid[1] for image in seen]
    if family.encoder is None and family.cells == "sizes":  # rows of an image end in a token of their own
        config = pruners.host.model.config
        side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
        sizes = [(h // side) * (w // side) for h, w in call.inputs["image_sizes"].tolist()]
        seen = [None] * len(sizes)
    elif family.encoder is None or family.cells == "anyres":
        visual = types == VISUAL
        begins = visual & (torch.nn.functional.pad(ids * visual, (1, 0))[:, :-1] != ids)  # a video may follow an image
        session.part(ImageColumns).images = (begins.cumsum(dim=1) * visual).to(torch.int16)
        return
    # generate before transformers 5.18 runs the tower once per beam; later ones once per prompt, shared by its beams
    times = 1 if sum(sizes) == int((types == VISUAL).sum()) else types.shape[0] // call.batch
    if family.encoder is not None:
        video = (ids == video_token_id(pruners.host.model))[::times]
        seen = in_prompt_order(seen, video[types[::times] == VISUAL])
        sizes = [image.grid[0] * image.grid[1] for image in seen]
    images, numbers, rows = iter(zip(seen, sizes, strict=True)), torch.zeros_like(types, dtype=torch.int16), []
    for row in range(types.shape[0] // times):
        columns, found = (types[row * times] == VISUAL).nonzero()[:, 0], []
        while len(columns):
            image, size = next(images, (None, 0))
            if not 0 < size <= len(columns):
                raise VlmFixError(
                    f"{pruners.all[0].name} could not match the image tokens to the vision tower's patches; pass "
                    "pixel_values, no pre-computed features, with vision_feature_select_strategy='default'."
                )
            found.append(image)
            numbers[row * times : (row + 1) * times, columns[:size]] = len(found)
            columns = columns[size:]
        rows += [found] * times
    session.parts[ImageColumns] = ImageColumns(numbers, rows)


def match_crops(pruners: Pruners, session: Session) -> None:
    """The same for images of several crops: each crop is an image of its own, `here` says which of its tokens are left.

    Newline columns belong to no image; `ImageColumns.newlines` says where their rows begin.
    """
    call, types, base = session.call, session.types, get_part(pruners.host.model, pruners.host.family.base)
    packed = anyres_index(base, call.inputs) if "image_sizes" in call.inputs else []
    size = anyres_side(base) ** 2
    tiles = [int(index.max()) // size + 1 for index in packed]
    runs = max(1, len(call.vision) // max(1, sum(tiles)))  # generate before transformers 5.18: one for each beam
    packed, times = [index for index in packed for _ in range(runs)], types.shape[0] // call.batch // runs
    if any(bool((index == -2).any()) for index in packed):
        raise VlmFixError(
            f"{pruners.all[0].name}: the image is larger than the model's {base.config.vision_aspect_ratio}, so that "
            "its packed features are resized and belong to no patch; give the processor a smaller image."
        )
    pictures, crops = iter(packed), iter(call.vision)
    numbers, rows, newlines = torch.zeros_like(types, dtype=torch.int16), [], []
    for row in range(types.shape[0] // times):
        columns, found, ends = (types[row * times] == VISUAL).nonzero()[:, 0], [], []
        while len(columns):
            index = next(pictures, None)
            if index is None or len(index) > len(columns):
                raise VlmFixError(
                    f"{pruners.all[0].name} could not match the image tokens to the vision tower's patches; pass the "
                    "processor's whole output: pixel_values and image_sizes of images (no video)."
                )
            index = index.to(columns.device)
            for crop in range(int(index.max()) // size + 1):
                mine = index // size == crop
                image = dataclasses.replace(next(crops), here=index[mine] - crop * size)
                image.siblings = int(index.max()) // size + 1
                found.append(image)
                numbers[row * times : (row + 1) * times, columns[: len(index)][mine]] = len(found)
            start = size if image.siblings > 1 else 0
            for end in (index == -1).nonzero()[:, 0].tolist():
                ends.append((int(columns[start]), int(columns[end])))
                start = end + 1
            columns = columns[len(index) :]
        rows += [found] * times
        newlines += [ends] * times
    session.parts[ImageColumns] = ImageColumns(numbers, rows, newlines)


def choose(
    pruners: Pruners, session: Session, types: torch.Tensor, embeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L] True for text and kept visual columns, and the embeddings, merged ones replaced; image by image."""
    keep, pruner = types != VISUAL, pruners.pruner
    merges = isinstance(pruner, TokenMerger)
    embeds = embeds.clone() if merges else embeds
    shown = session.part(ImageColumns)
    asked = question_columns(session) if pruner and pruner.asks else None
    for row, images in enumerate(shown.vision):
        if row and images is shown.vision[row - 1]:  # a beam of the same prompt
            keep[row], embeds[row] = keep[row - 1], embeds[row - 1] if merges else embeds[row]
            continue
        for number, image in enumerate(images, 1):
            columns = (shown.images[row] == number).nonzero()[:, 0]
            image.features = features_of(image, embeds[row, columns.to(embeds.device)])
            image.question = None if asked is None else embeds[row, asked[row].to(embeds.device)]
            own = share(pruner, image.siblings)
            with torch.set_grad_enabled(merges and torch.is_grad_enabled()):
                index, merged = own.reduce(image) if merges else (own.select(image), None)
            check_choice(pruner, index, image)
            place = columns
            if image.here is not None:
                place = torch.full((image.grid[0] * image.grid[1],), -1, device=columns.device)
                place[image.here] = columns
            chosen = place[index.to(columns.device)]
            left = chosen >= 0  # a crop's padding may be chosen too, but it is not in the prompt
            chosen = chosen[left]
            keep[row, chosen] = True
            if merged is not None:
                embeds[row, chosen.to(embeds.device)] = merged[left.to(merged.device)].to(embeds)
        for start, end in shown.newlines[row] if shown.newlines else ():
            keep[row, end] = keep[row, start:end].any()
    return keep, embeds


def check_choice(pruner: Any, index: Any, image: ImageTokens) -> None:
    """VlmFixError unless `index` names tokens of the image, each once."""
    count = image.grid[0] * image.grid[1]
    right = isinstance(index, torch.Tensor) and index.dim() == 1 and not index.is_floating_point()
    right = right and index.dtype != torch.bool and len(index) <= count
    if right and len(index):  # once a prompt, whose columns are read from the device anyway
        right = bool(((index >= 0) & (index < count)).all() & (index.sort().values.diff() != 0).all())
    if not right:
        what = (
            f"a {index.dtype} tensor of shape {list(index.shape)}"
            if isinstance(index, torch.Tensor)
            else str(type(index))
        )
        raise VlmFixError(
            f"{pruner.name}: select must return the indices of the tokens to keep, a tensor of up to {count} different "
            f"integers from 0 to {count - 1}; it returned {what}."
        )


def features_of(image: ImageTokens, embeds: torch.Tensor) -> torch.Tensor:
    """[N, C] features of all tokens of an image or crop; those that the prompt leaves out are projected again."""
    if image.here is None or image.chosen is not None:
        return embeds
    assert image.raw is not None and image.project is not None
    if len(image.here) == image.grid[0] * image.grid[1]:
        return embeds
    features = image.project(image.raw()).to(embeds)
    features[image.here.to(embeds.device)] = embeds
    return features


def share(pruner: Any, crops: int) -> Any:
    """The pruner for one of an image's crops: a count is shared evenly, as HiPrune does."""
    if crops == 1 or pruner.keep is None or pruner.keep <= 1:
        return pruner
    if pruner.keep < 2 * crops:
        raise VlmFixError(
            f"{pruner.name}: keep={pruner.keep:g} is too little for an image of {crops} crops; give at least {2 * crops}, "
            "or a share such as keep=0.2."
        )
    return dataclasses.replace(pruner, keep=int(pruner.keep) // crops)
