"""What OPERA's search knows of its beams and sees of their candidates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from vlm_fix import Memory, Method
from vlm_fix.decoding.search import Sequences
from vlm_fix.rows import Rows


@dataclass
class Beams:
    """The search before the choice of token t: n beams, their over-trust sums [n, t], and finished answers."""

    tokens: torch.Tensor  # [n, t]
    scores: torch.Tensor  # [n]
    parents: torch.Tensor  # [n] beams of the state before
    done: list[tuple[float, torch.Tensor]]  # (score / length ** length_penalty, tokens), best first
    sums: torch.Tensor  # [n, t] log prod_{i >= j} (scale A[i, j]) of response columns j
    place: list[int] = field(default_factory=list)  # per beam, the column that its candidates trust most


class Tried(NamedTuple):
    """What was seen of the k candidates of each beam, which are in the cache side by side."""

    tokens: torch.Tensor  # [n, k]
    sums: torch.Tensor  # [n, k, t + 1] `Beams.sums` with them
    logits: torch.Tensor  # [n, k, V] after them


@dataclass
class OPERAMemory(Memory):
    row: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # [B, r, K] A of the last rows
    image: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # [B, r] its sum over the image columns

    def add(self, peak: torch.Tensor, rows: Rows) -> None:
        """A [B, r, K] of a forward's rows, or of the next chunk of them; on the layer's device."""
        image = (peak * rows.visual[:, 0]).sum(dim=-1)
        if rows.numbers[0] > max(rows.session.start, rows.session.prompt_len - 1):
            peak, image = torch.cat([self.row, peak], dim=1), torch.cat([self.image, image], dim=1)
        self.row, self.image = peak, image


def seen(
    seqs: Sequences, tokens: torch.Tensor, method: Method
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A [n, k, t + 1] of candidates [n, k] and its sums over the image [n, k]; the logits after them, left in the cache.

    One forward for all of them; beside other methods, which would take them for k places, one for each, and no logits.
    """
    size, found = seqs.length, []
    if seqs.host.active == [method]:
        logits, memory = seqs.side_by_side(tokens), seqs.memory(method, OPERAMemory)
        past = memory.row.shape[-1] - tokens.shape[1]
        own = memory.row[..., past:].diagonal(dim1=1, dim2=2)[..., None]
        return torch.cat([memory.row[..., past - size : past], own], dim=-1), memory.image, logits
    for token in tokens.T:
        seqs.forward(token[:, None])
        seqs.crop(1)
        memory = seqs.memory(method, OPERAMemory)
        found.append((memory.row[:, -1, -size - 1 :], memory.image[:, -1]))
    rows, image = zip(*found, strict=True)
    return torch.stack(rows, dim=1), torch.stack(image, dim=1), None
