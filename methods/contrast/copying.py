"""How much each head of a model copies from its context: a needle in a haystack."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlm_fix import VlmFixError
from vlm_fix.engine import Engine
from vlm_fix.recorder import Recorder
from vlm_fix.sample import Sample
from vlm_fix.session import Session


def copied(model: Any, samples: Sequence[Sample], seed: int, progress: Callable[[str, float], None]) -> torch.Tensor:
    """[layers, heads]: how often each head's largest weight lies on the token that it would copy next, in [0, 1].

    Mean over the tokens of a needle, repeated after a haystack of the samples' texts, and over as many needles as samples.
    """
    config, drawn = model.config, random.Random(seed)
    special = {getattr(config, name, None) for name in vars(config) if name.endswith("token_id")}
    special |= {config.get_text_config().bos_token_id, model.generation_config.eos_token_id}
    texts = [[t for t in s.inputs["input_ids"][0].tolist() if t not in special] for s in samples]
    words = sorted({t for text in texts for t in text})
    size, first = min(8, len(words)), config.get_text_config().bos_token_id
    bos = [first] if isinstance(first, int) else []
    if size < 2:
        raise VlmFixError("decore: the samples hold fewer than two different words; take more of them.")
    engine = Engine(model, [])
    hits = torch.zeros(engine.arch.depth, engine.arch.heads)
    engine.install(idle=True)
    try:
        for i in range(len(samples)):
            hay = [t for text in drawn.sample(texts, min(4, len(texts))) for t in text]
            needle, at = drawn.sample(words, size), drawn.randrange(len(hay) + 1)
            ids = [*bos, *hay[:at], *needle, *hay[at:], *needle[:-1]]
            hits += copies(engine, torch.tensor([ids], device=model.device), len(bos) + at, size) / len(samples)
            progress("needles", (i + 1) / len(samples))
    finally:
        engine.remove()
    return hits


class Copying(Recorder):
    """Records of the last rows which heads look at the token that comes next."""

    def __init__(self, targets: range, depth: int, heads: int):
        self.targets, self.hits = targets, torch.zeros(depth, heads)

    def first_row(self, session: Session) -> int:
        return session.length - len(self.targets)

    def weights(self, layer: int, session: Session, first: int, weights: torch.Tensor, i: int) -> None:
        found = weights[0].argmax(dim=-1).cpu() == torch.tensor(self.targets)[i : i + weights.shape[2]]
        self.hits[layer] += found.float().sum(dim=-1) / len(self.targets)


@torch.no_grad()
def copies(engine: Engine, ids: torch.Tensor, start: int, size: int) -> torch.Tensor:
    """[1, L] ids that end with all but the last of the `size` tokens at `start` -> hit rate of each head [layers, heads]."""
    copying = Copying(range(start + 1, start + size), engine.arch.depth, engine.arch.heads)
    engine.run_prompt({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, copying)
    return copying.hits
