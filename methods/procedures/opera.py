"""OPERA, over-trust penalty and retrospection-allocation (Huang et al., CVPR 2024)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from statistics import mode
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize, pad

from vlm_fix import Layers, Memory, Searcher, WeightReader, param
from vlm_fix.arch import Arch
from vlm_fix.decoding.search import Search, Sequences
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


@dataclass
class OPERAMemory(Memory):
    row: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # [B, K] A of the last row
    image: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # [B] its sum over the image columns


@dataclass(frozen=True)
class OPERA(WeightReader, Searcher):
    """Beam search that penalises candidates whose attention piles up on one earlier token, and goes back behind it.

    A [n, K]: last-layer weights of a candidate's own row, maximum over heads, made to sum to 1; over the t + 1 response
    columns s_j = 1e-7 prod_{i >= j} (scale A[i, j]), phi = max_j s_j (while the response has at most `warmup` tokens:
    minus the image columns' sum). Each beam's `candidates` best tokens get logit - weight phi, all others -999.
    If the column j* that most candidates of most beams trust has been, for every beam, more than `threshold` times the
    one, and j* >= warmup, the search returns to the choice of token j* + 1 (after `candidates` returns: j*), where what
    was chosen gets the lowest logit, and the penalty is left out once.

    Source: arXiv 2311.17911; official code shikiw/OPERA@61426ef (5 beams, 5 candidates, scale 50, threshold 15, weight 1).
    Deviations: products are summed as logarithms, and a penalty beyond 65504 counts as that (the official float16 gives
    infinity there, and 0 or multiples of 6e-8 below); going back, the official code forgets the wrong rejections, as it
    counts positions from the end of a fixed window of 512: here those of later positions are forgotten; ties of "most"
    go to the earlier column; scores are divided by the generated length. Prompts are searched one by one; weight 0: plain.
    """

    name: ClassVar[str] = "opera"
    kind: ClassVar[str] = "procedure"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.17911"
    needs_image: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"weight": (0.5,)}
    refuses: ClassVar[dict[str, str]] = {
        "num_beams": "set opera:beams=N instead",
        "do_sample": "it is a beam search; pass do_sample=False",
        "streamer": "a beam may still change, so leave it out",
        "output_scores": "leave it out",
        "output_logits": "leave it out",
    }

    weight: float = param(1.0, "weight of the penalty", low=0)
    beams: int = param(5, "number of beams", low=1)
    candidates: int = param(5, "tokens tried for each beam, and returns to one position", low=1)
    scale: float = param(50.0, "factor of attention weights", low=0)
    threshold: int = param(15, "recurrences of a trusted column before going back", low=1)
    warmup: int = param(10, "first tokens, where the image decides and no return leads", low=0)
    layers: Layers = param(None, "the layer whose attention is read (one)")

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": (arch.depth - 1,)}

    @property
    def neutral(self) -> bool:
        return self.weight == 0

    def read_weights(self, weights: torch.Tensor, rows: Rows) -> None:
        peak = normalize(weights[:, :, -1].amax(dim=1), p=1, dim=-1)
        memory = rows.memory(OPERAMemory)
        memory.row, memory.image = peak, (peak * rows.visual[:, 0, 0]).sum(dim=-1)  # on the layer's device

    def search(self, run: Search) -> Any:
        sequences, logits = run.prefill()
        sequences.need_rollback(self.name)
        answers = []
        for i, row in enumerate(logits):
            same = torch.full((self.beams,), i, device=row.device)
            answers.append(self.answer(run, run.prompt[same], sequences.take(same), row.expand(self.beams, -1)))
        scores, tokens = zip(*answers, strict=True)
        return run.output(list(tokens), sequences_scores=torch.tensor(scores, device=logits.device))

    def answer(self, run: Search, prompt: torch.Tensor, seqs: Sequences, logits: torch.Tensor) -> tuple[float, Any]:
        """(score, tokens) of the best beam of one prompt [n, L] whose first token has `logits` [n, V]."""
        scores = torch.tensor([0.0] + [-1e9] * (self.beams - 1), device=logits.device)  # the beams are alike at first
        beams = Beams(prompt[:, :0], scores, torch.arange(self.beams, device=logits.device), [], logits[:, :0])
        history, returns, rejected = list[Beams](), Counter[int](), dict[int, list[torch.Tensor]]()
        while True:
            history.append(beams)
            z, beams.place = self.penalised(logits, seqs, beams)
            position = self.rollback([b.place for b in history], returns)
            if position is not None:
                last, beams = history[position + 1], history[position]
                history = history[: position + 1]
                rejected = {k: v for k, v in rejected.items() if k <= position}
                rejected.setdefault(position, []).append(last.parents * logits.shape[1] + last.tokens[:, -1])
                seqs.crop(seqs.length)
                z = seqs.forward(beams.tokens).clone()
                refused = torch.cat(rejected[position])
                z.view(-1)[refused] = z.amin(dim=-1)[refused // z.shape[1]]
            beams = Beams(*run.beam_step(prompt, beams.tokens, beams.scores, z, beams.done), beams.sums)
            if not len(beams.tokens):
                return beams.done[0]
            beams.sums = beams.sums[beams.parents]
            seqs.reorder(beams.parents)
            logits = seqs.forward(beams.tokens[:, -1:])
            row = seqs.memory(self, OPERAMemory).row[:, -beams.tokens.shape[1] :].to(logits.device)
            beams.sums = pad(beams.sums, (0, 1)) + (self.scale * row).log()

    def penalised(self, logits: torch.Tensor, seqs: Sequences, beams: Beams) -> tuple[torch.Tensor, list[int]]:
        """Logits [n, V] with the penalty, -999 but for the candidates, and each beam's most trusted column."""
        values, tokens = logits.topk(self.candidates, dim=-1)
        z, places, size = torch.full_like(logits, -999.0), [], beams.tokens.shape[1] + 1
        for value, token in zip(values.T, tokens.T, strict=True):
            seqs.forward(token[:, None])
            seqs.crop(1)
            seen = seqs.memory(self, OPERAMemory)
            log_s = pad(beams.sums, (0, 1)) + (self.scale * seen.row[:, -size:].to(z.device)).log()
            phi, place = (log_s + math.log(1e-7)).exp().clamp(max=65504).max(dim=-1)
            phi = -seen.image.to(z.device) if size <= self.warmup else phi
            z.scatter_(1, token[:, None], (value - self.weight * phi)[:, None].to(z))
            places.append(place)
        return z, [mode(sorted(p)) for p in torch.stack(places, dim=1).tolist()]

    def rollback(self, places: list[list[int]], returns: Counter[int]) -> int | None:
        """The position to choose again; counted in `returns`."""
        place = mode(sorted(places[-1]))  # the smallest of several
        seen = min(sum(place == then[i] for then in places) for i in range(self.beams))
        if seen <= self.threshold or place < self.warmup:
            return None
        for position in (place + 1, place):
            if position < len(places) - 1 and returns[position] < self.candidates:
                returns[position] += 1
                return position
        return None
