"""OPERA, over-trust penalty and retrospection-allocation (Huang et al., CVPR 2024)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from statistics import mode
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize, pad

from vlm_fix import Layers, Searcher, WeightReader, param
from vlm_fix.arch import Arch
from vlm_fix.decoding.search import Search, Sequences
from vlm_fix.rows import Rows

from .over_trust import Beams, OPERAMemory, Tried, seen


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
    candidates: int = param(5, "tokens tried for each beam (at most all there are), and returns to one position", low=1)
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
        rows.memory(OPERAMemory).add(normalize(weights.amax(dim=1), p=1, dim=-1), rows)

    def search(self, run: Search) -> Any:
        sequences, logits = run.prefill()
        sequences.need_rollback(self.name)
        answers = []
        blind = [last < 0 for last in run.host.sessions[sequences.cache].last_visual]
        for i, row in enumerate(logits):
            if blind[i]:  # as the model answers such a prompt alone
                at = torch.tensor([i], device=row.device)
                answers.append(run.greedy(run.prompt[at], sequences.take(at), row[None]))
                continue
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
            z, tried = self.penalised(logits, seqs, beams)
            position = self.rollback([b.place for b in history], returns)
            if position is not None:
                last, beams = history[position + 1], history[position]
                history = history[: position + 1]
                rejected = {k: v for k, v in rejected.items() if k <= position}
                rejected.setdefault(position, []).append(last.parents * logits.shape[1] + last.tokens[:, -1])
                seqs.crop(seqs.length)
                z, tried = seqs.forward(beams.tokens).clone(), None
                refused = torch.cat(rejected[position])
                z.view(-1)[refused] = z.amin(dim=-1)[refused // z.shape[1]]
            sums = beams.sums
            beams = Beams(*run.beam_step(prompt, beams.tokens, beams.scores, z, beams.done), sums)
            if not len(beams.tokens):
                return beams.done[0]
            parents, chosen = beams.parents, beams.tokens[:, -1:]
            if tried:
                found = tried.tokens[parents] == chosen
                if bool(found.any(dim=1).all()):
                    ranks = found.int().argmax(dim=1)
                    seqs.keep(parents, ranks, tried.tokens.shape[1])
                    logits, beams.sums = tried.logits[parents, ranks], tried.sums[parents, ranks]
                    continue
                seqs.crop(tried.tokens.shape[1])
            seqs.reorder(parents)
            logits = seqs.forward(chosen)
            row = seqs.memory(self, OPERAMemory).row[:, -1, -beams.tokens.shape[1] :].to(logits.device)
            beams.sums = pad(sums[parents], (0, 1)) + (self.scale * row).log()

    def penalised(self, logits: torch.Tensor, seqs: Sequences, beams: Beams) -> tuple[torch.Tensor, Tried | None]:
        """Logits [n, V] with the penalty, -999 but for the candidates; `beams.place` becomes what each trusts most."""
        values, tokens = logits.topk(min(self.candidates, logits.shape[1]), dim=-1)
        rows, image, after = seen(seqs, tokens, self)
        sums = pad(beams.sums, (0, 1))[:, None] + (self.scale * rows.to(logits.device)).log()
        phi, places = (sums + math.log(1e-7)).exp().clamp(max=65504).max(dim=-1)
        phi = -image.to(logits.device) if sums.shape[-1] <= self.warmup else phi
        z = torch.full_like(logits, -999.0).scatter_(1, tokens, (values - self.weight * phi).to(logits))
        beams.place = [mode(sorted(p)) for p in places.tolist()]
        return z, None if after is None else Tried(tokens, sums, after)

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
