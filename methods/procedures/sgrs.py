"""SGRS, saliency-guided rejection sampling ("Hallucination Begins Where Saliency Drops", Zhang et al., ICLR 2026)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm_fix import Layers, Memory, WeightReader, param
from vlm_fix.arch import Arch
from vlm_fix.decoding.kinds import Searcher
from vlm_fix.decoding.search import Search, Sequences
from vlm_fix.decoding.step import fingerprints
from vlm_fix.rows import Rows


@dataclass
class SGRSMemory(Memory):
    """weights: layer -> A [B, H, 1, K] of the last forward, part of its graph."""

    weights: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SGRS(WeightReader, Searcher):
    """Samples a token and takes it only if the answer so far matters to it as much as to the tokens before.

    For a candidate c drawn from the `top_k` likeliest, with A [H, K] the weights of the row that predicts c and
    L = -log p(c): s = mean_h |A * dL/dA|, s / ||s||_2, S(c) = its mean over the columns of generated tokens and over
    `layers`. c is taken if S(c) >= alpha * mean of the last `window` taken tokens' S, otherwise another one is drawn;
    after `tries` of them, the candidate with the largest S is taken. One forward per token; a backward per candidate,
    through one row.

    Source: arXiv 2601.20279; official code zhangbaijin/LVLMs-Saliency@05c0d0d (top_k 5, alpha .6, window 5, tries 3,
    layers 6-8 of 32, scaled here to the depth).
    Deviations: the official code reads the row of c itself, which the loss does not reach: its S is 0 for every c, and
    all are taken. It also averages over the question's columns. The first token has no column to look back to: it is
    taken as drawn, and does not count in the mean. Scores are those after generate's processors, so temperature acts.
    top_k = 1 is the model's own decoding.
    """

    name: ClassVar[str] = "sgrs"
    kind: ClassVar[str] = "procedure"
    paper: ClassVar[str] = "https://arxiv.org/abs/2601.20279"
    needs_image: ClassVar[bool] = False
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.3,)}
    refuses: ClassVar[dict[str, str]] = {
        "num_beams": "it draws one answer a row, so leave it out",
        "output_scores": "leave it out",
        "output_logits": "leave it out",
    }

    alpha: float = param(0.6, "share of the recent saliency that a token must reach", low=0)
    top_k: int = param(5, "candidates", low=1)
    window: int = param(5, "taken tokens whose saliency is averaged", low=1)
    tries: int = param(3, "draws before the most salient candidate is taken", low=1)
    seed: int = param(0, "seed of the draws", low=0, high=2**32 - 1)
    layers: Layers = param(None, "layers whose attention is differentiated")

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"layers": tuple(sorted({min(round(i / 32 * arch.depth), arch.depth - 1) for i in (6, 7, 8)}))}

    @property
    def neutral(self) -> bool:
        return self.top_k == 1

    def read_weights(self, weights: torch.Tensor, rows: Rows) -> None:
        if torch.is_grad_enabled():
            kept = weights if weights.requires_grad else weights.requires_grad_()
            rows.memory(SGRSMemory).weights[rows.layer] = kept

    def search(self, run: Search) -> Any:
        seqs, logits = run.prefill()
        seqs.need_gradients(self.name)
        draws = [torch.Generator().manual_seed(zlib.crc32(f"{self.seed},{p}".encode())) for p in fingerprints(run.call)]
        ids, rows = run.prompt, range(len(run.prompt))
        taken: list[list[float]] = [[] for _ in rows]
        alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        length = [0 for _ in rows]
        while True:
            scores = run.processors(ids, logits.detach())
            top, tokens = scores.topk(min(self.top_k, scores.shape[1]), dim=-1)
            order = [drawn(p, draw) for p, draw in zip(top.softmax(dim=-1).cpu(), draws, strict=True)]
            ranks = self.choose(logits, seqs, tokens, order, taken, alive.tolist())
            new = tokens.gather(1, torch.tensor(ranks, device=ids.device)[:, None])
            new = torch.where(alive[:, None], new, run.pad)
            ids = torch.cat([ids, new], dim=1)
            length = [n + int(a) for n, a in zip(length, alive.tolist(), strict=True)]
            if run.streamer is not None:
                run.streamer.put(new[:, 0].cpu())
            alive = alive & ~run.stopping(ids, None).to(alive.device)
            if not alive.any():
                answers = ids[:, run.prompt.shape[1] :]
                return run.output([a[:n] for a, n in zip(answers, length, strict=True)])
            with torch.enable_grad():
                logits = seqs.forward(new)

    def choose(
        self,
        logits: torch.Tensor,
        seqs: Sequences,
        tokens: torch.Tensor,
        order: list[list[int]],
        taken: list[list[float]],
        alive: list[bool],
    ) -> list[int]:
        """The rank of the token that each row takes: logits [B, V], candidates [B, k] and the order they are drawn in."""
        if not seqs.length:
            return [ranks[0] for ranks in order]
        final: dict[int, int] = {row: ranks[0] for row, ranks in enumerate(order) if not alive[row]}
        found: list[dict[int, float]] = [{} for _ in order]
        for draw in range(tokens.shape[1]):
            if len(final) == len(order):
                break
            ranks = [ranks[min(draw, len(ranks) - 1)] for ranks in order]
            candidates = tokens.gather(1, torch.tensor(ranks, device=tokens.device)[:, None])
            for row, s in enumerate(self.saliency(logits, candidates, seqs).tolist()):
                found[row][ranks[row]] = s
                recent = taken[row][-self.window :]
                if row not in final and draw < self.tries and s >= self.alpha * sum(recent) / max(1, len(recent)):
                    final[row] = ranks[row]
        for row, seen in enumerate(found):
            final.setdefault(row, max(seen, key=lambda rank: seen[rank]) if seen else 0)
            if alive[row]:
                taken[row].append(seen[final[row]])
        return [final[row] for row in range(len(order))]

    def saliency(self, logits: torch.Tensor, candidates: torch.Tensor, seqs: Sequences) -> torch.Tensor:
        """S [B] of candidates [B, 1], from the last forward, which was run with gradients."""
        weights = list(seqs.memory(self, SGRSMemory).weights.values())
        with torch.enable_grad():  # a row's weights reach its own candidate only
            loss = -logits.log_softmax(dim=-1).gather(1, candidates).sum()
        total = torch.zeros(len(logits), device=logits.device)
        for a, grad in zip(weights, torch.autograd.grad(loss, weights, retain_graph=True), strict=True):
            s = (a * grad).detach().abs().mean(dim=1)[:, 0].to(logits.device)
            total += torch.nn.functional.normalize(s, dim=-1)[:, -seqs.length :].mean(dim=-1)
        return total / len(weights)


def drawn(p: torch.Tensor, generator: torch.Generator) -> list[int]:
    """The indices of p [k] > 0 in the order in which draws without replacement give them."""
    return torch.multinomial(p, int((p > 0).sum()), generator=generator).tolist()
