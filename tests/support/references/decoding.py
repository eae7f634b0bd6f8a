"""Float64 references of decoding methods."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from tests.support.models import IMAGE
from tests.support.references import base as ref

TOKENS = (11, 12, 13)


def second_prompt(name, inputs):
    ids = inputs["input_ids"][0].tolist()
    if name == "m3id":
        return {"input_ids": torch.tensor([[i for i in ids if i != IMAGE]])}
    at = max(i for i, t in enumerate(ids) if t == IMAGE) + 1
    at += ids[at] == 94  # Qwen's end marker
    new = torch.tensor([ids[:at] + list(TOKENS) + ids[at:]])
    return {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")} | {"input_ids": new} | (
        {"mm_token_type_ids": (new == IMAGE).int()} if "mm_token_type_ids" in inputs else {})  # fmt: skip


@dataclass
class Cake(ref.Reference):
    ids: list = field(default_factory=list)
    method: object = None

    def edited(self, row):
        return row >= self.prompt_len - 1 or self.rows == "all"

    def weight(self, a, layer, head, row):
        m, new = self.method, a.clone()
        for j in range(row + 1):
            if self.ids[j] in m.punctuation and layer in m.punctuation_layers and a[j] > m.punctuation_above:
                new[j] = 0
            if self.ids[j] in m.concepts and layer in m.concept_layers and a[j] > m.concept_above:
                new[j] = 0
        return new / new.sum() if new.sum() > 0 else a


@dataclass
class Recorder(ref.Reference):
    """Keeps the weights of the rows that predict."""

    seen: dict = field(default_factory=dict)

    def weight(self, a, layer, head, row):
        self.seen[row, head] = a.clone()
        return a


@torch.no_grad()
def deco(twin, method, main, states, keep, finish=None):
    """Logits or log-probabilities [V] and the layers' inputs -> scores [V], and which of them stay."""
    p, ranked, mass = main.softmax(-1).tolist(), [], 0.0
    for v in sorted(range(len(p)), key=lambda v: -p[v]):
        if mass >= method.top_p or len(ranked) == method.top_k:
            break
        ranked.append(v)
        mass += p[v]
    best = (-1.0, None)
    for x in states.values():
        logits = (finish or (lambda z: z))(twin.lm_head(twin.model.language_model.norm(x)))
        best = max(best, (max(float(logits.softmax(-1)[v]) for v in ranked), logits), key=lambda b: b[0])
    return main + method.alpha * best[0] * best[1], [v in ranked for v in range(len(p))]


@torch.no_grad()
def dola(twin, method, main, states, keep, finish=None):
    """Log-probabilities [V] and the layers' inputs -> scores [V], and which of them stay."""
    best = (-1.0, None)
    for x in states.values():
        early = (finish or (lambda z: z))(twin.lm_head(x)).log_softmax(-1)
        js = 0.0
        for a, b in zip(main.tolist(), early.tolist(), strict=True):
            m = (math.exp(a) + math.exp(b)) / 2
            js += m * (math.log(m) - a) / 2 + m * (math.log(m) - b) / 2
        best = max(best, (js, early), key=lambda c: c[0])
    return main - method.alpha * best[1], keep
