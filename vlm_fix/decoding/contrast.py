"""The second branch of a contrast method, as a logits processor that keeps its cache in step with the main sequences.

A processor is the one place that every decoding mode passes through. At each call the branch finds, for every row, the
row of its own cache with the longest equal prefix (a beam may have moved), rolls back what differs and runs the rest.
That makes it right under greedy, sampling, beam search, streaming and assisted decoding alike.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor

from ..errors import VlmFixError
from ..families import prompt_positions
from ..method import Contrast
from ..session import Call, Session


def plausible(scores: torch.Tensor, log_probs: torch.Tensor, beta: float) -> torch.Tensor:
    """Adaptive plausibility constraint (Li et al. 2023): -inf where p < beta max p. [B, V] each."""
    if beta <= 0:
        return scores
    cut = log_probs.amax(dim=-1, keepdim=True) + torch.log(torch.tensor(beta))
    return scores.masked_fill(log_probs < cut, -torch.inf)


class PrefixContrast(LogitsProcessor):
    """Replaces the scores [B, V] by `method.combine(main, negative)`, renormalised (beam search adds them up)."""

    def __init__(self, engine: Any, method: Contrast, call: Call):
        self.engine, self.method, self.call = engine, method, call
        self.branch: Branch | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.branch is None:
            self.branch = Branch(self.engine, self.method.negative(self.call), self.method.name)
        prompt = self.call.inputs["input_ids"].shape[1]
        generated = input_ids[:, prompt:]
        negative = self.branch.logits(generated)
        main = scores.float().log_softmax(dim=-1)
        other = negative.to(scores.device).float().log_softmax(dim=-1)
        combined = self.method.combine_at(generated.shape[1], main, other)
        return combined.log_softmax(dim=-1).to(scores.dtype)  # type: ignore[return-value]

    def close(self) -> None:
        """Let go of the branch and its cache."""
        self.branch = None


class Branch:
    """A sequence batch with its own cache, driven by the tokens that the main branch chose."""

    def __init__(self, engine: Any, inputs: dict[str, torch.Tensor], name: str):
        self.engine, self.inputs, self.name = engine, inputs, name
        self.call = Call(engine.model, engine.family, inputs)
        self.cache = DynamicCache(config=engine.model.config.get_text_config())
        self.mask = inputs["attention_mask"]
        self.tokens: torch.Tensor | None = None  # [B', t] generated tokens whose keys are in the cache
        self.next_position: torch.Tensor | None = None  # [B'] position id of the first generated token

    @torch.no_grad()
    def logits(self, generated: torch.Tensor) -> torch.Tensor:
        """[B', t] generated tokens -> this branch's next-token logits [B', V]."""
        if self.tokens is None:
            out = self._prefill()
            times = generated.shape[0] // self.mask.shape[0]
            if times > 1:  # beams or several samples of one prompt: they share its keys
                self.cache.batch_repeat_interleave(times)
                self.engine.sessions[self.cache].repeat(times)
                self.mask = self.mask.repeat_interleave(times, dim=0)
                self.next_position = self.next_position.repeat_interleave(times, dim=0)  # type: ignore[union-attr]
                out = out.repeat_interleave(times, dim=0)
            self.group = times
            self.tokens = generated[:, :0]
            if not generated.shape[1]:
                return out
        keep = self._synchronise(generated)
        new = generated[:, keep:]
        ones = torch.ones_like(generated)
        steps = torch.arange(keep, generated.shape[1], device=generated.device)
        positions = self.next_position[:, None] + steps  # type: ignore[index]
        out = self._forward({"input_ids": new, "attention_mask": torch.cat([self.mask, ones], dim=1)}, positions)
        self.tokens = generated
        return out

    def _prefill(self) -> torch.Tensor:
        positions, self.next_position = prompt_positions(self.engine.model, self.engine.family, self.inputs)
        length = self.inputs["input_ids"].shape[1]
        self.engine.sessions[self.cache] = Session(self.call, branch=self.name, prompt_len=length)
        return self._forward(self.inputs, positions, prefill=True)

    def _forward(self, inputs: dict[str, torch.Tensor], positions: torch.Tensor, prefill: bool = False) -> torch.Tensor:
        if self.engine.family.mrope and positions.dim() == 2:
            positions = positions.expand(3, -1, -1)
        base, model = self.engine.base, self.engine.model
        main, deltas = self.engine.call, getattr(base, "rope_deltas", None)
        self.engine.call = self.call
        try:
            out = model(**inputs, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        finally:
            self.engine.call = main
            if deltas is not None:
                base.rope_deltas = deltas
        return out.logits[:, -1]

    def _synchronise(self, generated: torch.Tensor) -> int:
        """Reorder and roll back the cache to the longest prefix common with `generated`; its length is returned."""
        assert self.tokens is not None
        old, n = self.tokens, min(self.tokens.shape[1], generated.shape[1] - 1)
        if n and not torch.equal(old[:, :n], generated[:, :n]):
            same = (generated[:, None, :n] == old[None, :, :n]).long().cumprod(-1).sum(-1)  # [B', B'] common prefix
            groups = torch.arange(len(old), device=old.device) // self.group
            same = torch.where(groups[:, None] == groups[None], same, -1) * 2 + torch.eye(
                len(old), device=old.device, dtype=same.dtype
            )
            best, parent = same.max(dim=1)
            self.cache.reorder_cache(parent)  # type: ignore[arg-type]
            n = int(best.min()) // 2
        if old.shape[1] > n:
            if any(getattr(layer, "is_sliding", False) for layer in self.cache.layers):
                raise VlmFixError(
                    f"{self.name} cannot roll back a sliding-window cache; use greedy, sampling or beam search."
                )
            self.cache.crop(n - old.shape[1])
        return n
