"""CCA, concentric causal attention (Xing et al., NeurIPS 2024), as a change of a stock model's inputs. Experimental."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Memory, VlmFixError, param
from vlm_fix.families import image_cells
from vlm_fix.families.compat import cache_of
from vlm_fix.inputs import InputEdit
from vlm_fix.session import PAD, VISUAL, Session
from vlm_fix.wing import engine_of


@dataclass
class CCAMemory(Memory):
    shift: torch.Tensor | None = None  # [B, 1] what is added to the positions of generated tokens


@dataclass(frozen=True)
class CCA(InputEdit):
    """Numbers image tokens by rings, from the border to the centre, so that all of them are close to the question.

    A token of an h x w image in row y, column x lies in ring r = min(y, x, h - 1 - y, w - 1 - x), and gets the position
    p + r, with p the position of the image's first token; text goes on at p + ceil(min(h, w) / 2), one after the last
    ring. Image tokens of ring r see those of rings <= r of their image, later ones in reading order too.

    Source: arXiv 2410.15926; official code xing0047/cca-llava@8b5bb61. EXPERIMENTAL: the paper trains with these positions
    and this mask, an untrained model has never seen them, and nobody reports what they do to it. Here for any grid and
    several images. The [L, L] boolean mask is formed once, as transformers does for a padded batch. The form for 3-D positions
    (M-RoPE) is this project's extension: an image token is placed like a word, with p + r as its time, row and column, where
    the model has (p, p + y, p + x) and goes on at p + max(h, w). Tokens of a ring then differ by content alone, as in the paper.
    """

    name: ClassVar[str] = "cca"
    kind: ClassVar[str] = "attention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.15926"

    positions: bool = param(True, "number image tokens by rings")
    mask: bool = param(True, "let image tokens see the rings up to their own")

    @property
    def neutral(self) -> bool:
        return not (self.positions or self.mask)

    def prepare(self, session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
        types, memory = session.types, session.memory(self, CCAMemory)
        if session.kept:
            raise VlmFixError("cca needs every token of the image's grid; use it without a pruning method.")
        if session.start >= session.prompt_len or not bool((types[:, session.start :] == VISUAL).any()):
            if not self.positions or memory.shift is None:
                return kwargs
            return {**kwargs, "position_ids": moved(session, kwargs, memory.shift)}
        session.need_whole_prompt(self.name)
        if session.start:
            raise VlmFixError(
                "cca numbers the images of a conversation together: for a new image pass all of it, without the kept cache."
            )
        ring, image, shift = self.places(session)
        memory.shift = shift[:, -1:]
        if self.mask:
            kwargs = {**kwargs, "attention_mask": self.allowed(session, kwargs, ring, image)}
        if self.positions:
            rows = slice(session.start, None)
            kwargs = {**kwargs, "position_ids": moved(session, kwargs, shift[:, rows], image[:, rows])}
        return kwargs

    def places(self, session: Session) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, n] each: an image token's ring, its image counted from 1 (0: text), and what is added to positions."""
        call = session.call
        ids = call.inputs["input_ids"].view(1, -1)  # the batch as one prompt
        cells = image_cells(call.model, call.family, {**call.inputs, "input_ids": ids})
        count = sum(grid.numel() for grid in cells)
        ring, image, ahead, saved = torch.zeros(4, count, dtype=torch.long)
        for i, grid in enumerate(cells):
            y, x = (torch.arange(n) for n in grid.shape)
            border = torch.minimum(torch.minimum(y, y.flip(0))[:, None], torch.minimum(x, x.flip(0))[None])
            places = grid.flatten()
            if places.min() < 0 or int(places[-1]) >= count or len(places) != int(places[-1] - places[0]) + 1:
                raise VlmFixError("cca needs images whose tokens are one grid in reading order, as llava's.")
            ring[places], image[places] = border.flatten(), i + 1
            mrope = call.family.mrope
            ahead[places] = border.flatten() - (0 if mrope else torch.arange(len(places)))
            saved[places[-1]] = (max(grid.shape) if mrope else len(places)) - (min(grid.shape) + 1) // 2
        tokens = engine_of(call.model).tokens
        ring, image, ahead, saved = (session.on_images(v, tokens) for v in (ring, image, ahead, saved))
        return ring, image, ahead - (saved.cumsum(dim=1) - saved)

    def allowed(
        self, session: Session, kwargs: dict[str, Any], ring: torch.Tensor, image: torch.Tensor
    ) -> torch.Tensor:
        """[B, 1, q, K] booleans: causal without padding, and rings within each image."""
        types, cache = session.types, cache_of(kwargs)
        text = session.call.model.config.get_text_config()
        window = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
        kinds = getattr(text, "layer_types", None) or [window]  # Mistral's windows are in every layer, and not listed
        if set(kinds) != {"full_attention"} or not session.call.family.causal:
            raise VlmFixError(
                "cca's mask needs full causal attention in every layer; use cca:mask=false on this model."
            )
        columns = torch.arange(types.shape[1], device=types.device)
        allowed = (columns <= columns[session.start :, None]) & (types != PAD)[:, None]
        rows = slice(session.start, None)
        same = (image[:, rows, None] == image[:, None]) & (image[:, None] > 0)
        allowed = torch.where(same, ring[:, None] <= ring[:, rows, None], allowed)
        width = cache.get_mask_sizes(session.length, 0)[0] if cache is not None else types.shape[1]
        return torch.nn.functional.pad(allowed, (0, max(0, width - types.shape[1])))[:, None]


def moved(
    session: Session, kwargs: dict[str, Any], shift: torch.Tensor, image: torch.Tensor | None = None
) -> torch.Tensor:
    """Position ids [B or 1, q] or, with M-RoPE, [3 or 4, B, q] of this forward, with `shift` [B, q or 1] added.

    image [B, q]: in the prompt, > 0 for image tokens, whose three components all become the first, the image's place.
    """
    places = kwargs.get("position_ids")
    if places is None:
        places = torch.arange(session.start, session.types.shape[1], device=session.types.device)[None]
    if session.call.family.mrope and places.dim() == 3:
        axes = places[-3:] if image is None else torch.where(image > 0, places[-3:-2], places[-3:])
        return torch.cat([places[:-3], axes + shift])  # transformers puts the columns' own numbers first, for its masks
    if session.call.family.mrope and image is not None:
        raise VlmFixError(
            "cca needs the prompt's 3-D positions: pass the processor's mm_token_type_ids, no position_ids."
        )
    return places + shift
