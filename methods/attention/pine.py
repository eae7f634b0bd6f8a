"""PINE, position-invariant inference (Wang et al., ICLR 2025), for the images of a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm_fix import Memory, QueryKeyReader, RowScope, ScoreEdit, VlmFixError, param
from vlm_fix.attention.inputs import QueryRows
from vlm_fix.inputs import InputEdit
from vlm_fix.pruning.rows import half_turned
from vlm_fix.rows import Rows
from vlm_fix.session import VISUAL, Session

from .segments import allowed, check, image_weights, segments_of, stood_back, turned, turns


@dataclass
class PINEMemory(Memory):
    segment: torch.Tensor | None = None  # [B, n] the image that a column belongs to, from 1; 0: other text
    lengths: torch.Tensor | None = None  # [B, M] of each image, in positions; 0: there is none
    ahead: torch.Tensor | None = None  # [B, M] positions from its end to that of the last image
    tables: dict[str, torch.Tensor] = field(default_factory=dict)  # cos, sin [B, q, D] of this forward's rows
    plain: dict[int, torch.Tensor] = field(
        default_factory=dict
    )  # layer -> the prompt's keys [B, Hkv, n, D] without positions
    now: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # of the layer that runs: query, bare [B, H, q, D], key, shift


@dataclass(frozen=True)
class PINE(ScoreEdit, QueryKeyReader, InputEdit):
    """Lets images see each other, and each row see them in an order of its own: the order in a prompt no longer matters.

    Image m takes l_m positions. A row outside of the images gives image m the weight s_m, the mean over its columns of
    softmax(q k / sqrt(d)) over all images' columns, q and k without positions, head by head. The images then stand, for
    this row and head, in the order of s, the highest next to the text after them. A row of image i stands in the last
    place, i's own; the others follow by the mean over i's rows of s, softmax over the other images' columns. Rotary
    positions are set anew in each score, values are not touched; within an image attention stays causal.

    Source: arXiv 2407.01100; official code wzq016/PINE@5c2e9de, there for the documents of a text. What belongs to an image: its
    tokens, the markers around them, and text up to the next image. So the answer is exactly the same in any order where nothing
    stands between the images, or the same after each and after the last. M-RoPE: all three components of an image move together.
    Rows of images and after them go through the row kernel. Needs full causal attention and a plain rotary embedding.
    """

    name: ClassVar[str] = "pine"
    kind: ClassVar[str] = "attention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.01100"
    row_scope = RowScope.ALL
    idle_reason: ClassVar[str] = "no prompt of it holds several images."

    order: str = param("attention", "images in each row's own order, or as given", choices=("attention", "given"))
    mask: bool = param(True, "let images see each other")

    @property
    def neutral(self) -> bool:
        return self.order == "given" and not self.mask

    def prepare(self, session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
        memory, places = session.memory(self, PINEMemory), kwargs.get("position_ids")
        if places is None:
            places = torch.arange(session.start, session.types.shape[1], device=session.types.device)[None]
        if session.start == 0 and bool((session.types == VISUAL).any()):
            session.need_whole_prompt(self.name)
            check(session, kwargs["inputs_embeds"], places)
            if session.kept:
                raise VlmFixError("pine needs all tokens of the images; use it without a pruning method.")
            memory.segment, memory.lengths, memory.ahead = segments_of(
                session, places[-3] if places.dim() == 3 else places
            )
            if self.mask and int((memory.lengths > 0).sum(dim=1).max()) > 1:
                kwargs = {**kwargs, "attention_mask": allowed(session, kwargs, memory.segment)}
        if memory.segment is not None:
            memory.tables = dict(zip(("cos", "sin"), turns(session, places), strict=True))
        return kwargs

    def read_queries_and_keys(self, inputs: QueryRows, rows: Rows) -> None:
        memory = rows.memory(PINEMemory)
        if memory.segment is None or self.order == "given":
            return
        compute = torch.promote_types(inputs.query.dtype, torch.float32)
        query, key = inputs.query.to(compute), inputs.key.to(compute)
        cos, sin = (memory.tables[name].to(query.device) for name in ("cos", "sin"))
        if cos.shape[-1] != query.shape[-1] or inputs.scores.softcap is not None:
            raise VlmFixError(
                "pine needs plain rotary attention, without a soft cap or a part left unturned: not this model's."
            )
        bare, n = half_turned(query, cos, -sin), memory.segment.shape[1]
        if rows.prefill:
            memory.plain[rows.layer] = half_turned(key[:, :, :n], cos, -sin)
        memory.now = {"query": query * inputs.scores.scaling, "bare": bare * inputs.scores.scaling, "key": key}
        if rows.prefill and inputs.query.shape[2] > 1:
            memory.now["shift"] = between(memory, rows.layer)

    def edit_scores(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        memory = rows.memory(PINEMemory)
        if memory.segment is None or self.order == "given":
            return scores
        new, index = scores.clone(), rows.positions - rows.session.start
        for b, segment in enumerate(memory.segment.to(scores.device)):
            if int(segment.max()) < 2:
                continue
            last = int(segment.nonzero()[-1])
            of = torch.where(rows.positions < len(segment), segment[rows.positions.clamp(max=len(segment) - 1)], 0)
            for m in [*of[of > 0].unique().tolist(), 0]:
                chosen = (of == m) & ((rows.positions > last) | (m > 0))
                if bool(chosen.any()):
                    new[b, :, chosen] = placed(rows, b, m, index[chosen], scores[b][:, chosen], segment)
        return new


def placed(rows: Rows, b: int, m: int, index: torch.Tensor, z: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """z [H, r, K] of rows of image m (0: after the images) with the images in the rows' own order."""
    memory = rows.memory(PINEMemory)
    assert memory.ahead is not None and memory.lengths is not None
    query, key, ahead, out = memory.now["query"][b][:, index], memory.now["key"][b], memory.ahead[b], z.clone()
    groups, columns = len(query) // len(key), torch.arange(z.shape[-1], device=z.device)
    if m:
        query = turned(rows.session, query, int(ahead[m - 1]))
        before = columns < int(segment.nonzero()[0])
        out[..., before] = query @ key[:, before].repeat_interleave(groups, dim=0).mT
        shift = memory.now["shift"][b, :, m - 1][:, None].expand(-1, query.shape[1], -1)
    else:
        plain = memory.plain[rows.layer][b].repeat_interleave(groups, dim=0)
        s = image_weights(memory.now["bare"][b][:, index] @ plain.mT, segment)
        shift = stood_back(s, memory.lengths[b].to(s.device))
    for j in range(int(segment.max())):
        offset, own = int(ahead[j]) - shift[..., j], (segment == j + 1).nonzero()[:, 0]
        for value in offset.unique().tolist():
            keys = turned(rows.session, key[:, own], int(value)).repeat_interleave(groups, dim=0)
            out[..., own] = torch.where((offset == value)[..., None], query @ keys.mT, out[..., own])
    return out


def between(memory: PINEMemory, layer: int) -> torch.Tensor:
    """[B, H, M, M] how far image j stands back, in positions, for the rows of image i."""
    assert memory.segment is not None and memory.lengths is not None
    bare, plain, count = memory.now["bare"], memory.plain[layer], memory.lengths.shape[1]
    shift = torch.zeros(len(bare), bare.shape[1], count, count, device=bare.device)
    for b, segment in enumerate(memory.segment.to(bare.device)):
        keys = plain[b].repeat_interleave(bare.shape[1] // plain.shape[1], dim=0)
        for i in range(int(segment.max())):
            s = image_weights(bare[b][:, segment == i + 1] @ keys.mT, segment, i + 1).mean(dim=1)
            s[:, i] = torch.inf  # its own image stands last
            shift[b, :, i, : s.shape[-1]] = stood_back(s, memory.lengths[b].to(s.device))
    return shift
