"""Float64 references of decoding methods."""

from __future__ import annotations

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
