"""ICD, instruction contrastive decoding (Wang et al., Findings of ACL 2024)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import Contrast, VlmFixError, param
from vlm_fix.call import Call
from vlm_fix.decoding.contrast import plausible
from vlm_fix.families import image_token_ids
from vlm_fix.packing import by_token

CONFUSED = "You are a confused objects detector to provide a fuzzy overview or impression of the image."


@dataclass(frozen=True)
class ICD(Contrast):
    """Contrasts the next token with what a disturbing instruction would give.

    z = (1 + alpha) log p - alpha log p', tokens with p < beta max p cut off; p' sees the disturbance, on a line of its
    own, between the (last) image and the user's text. Its tokens come from the tokenizer in the model's directory, or
    as `tokens`; prompts without an image stay as they are.

    Source: arXiv 2403.18715; official code p1k0pan/ICD@91ed22f (alpha 1, beta .1, the disturbance of `prompt`).
    Deviations: the official LLaVA script puts the disturbance in place of the system prompt, which depends on the chat
    template; after the image it does not. The official code works for sampling only, this in all modes.
    """

    name: ClassVar[str] = "icd"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.18715"
    on_logits: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"alpha": (0.25, 0.5)}

    alpha: float = param(1.0, "contrast strength", low=0)
    beta: float = param(0.1, "plausibility cut-off", low=0, high=1)
    prompt: str = param(CONFUSED, "the disturbing instruction")
    tokens: tuple[int, ...] | None = param(None, "its token ids, instead of `prompt`", of="token ids")

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    def negative(self, call: Call) -> dict[str, torch.Tensor]:
        return after_image(call, self.tokens or line_tokens(call.model, self.prompt, self.name))

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        return plausible((1 + self.alpha) * l - self.alpha * l_neg, l, self.beta)


def line_tokens(model: Any, text: str, name: str, instead: str = "") -> tuple[int, ...]:
    """Token ids of `text` as a line; VlmFixError if the model's directory has no tokenizer, with what to give `instead`."""
    try:
        return _tokenized(model.config.name_or_path, text)
    except (OSError, ValueError) as problem:
        raise VlmFixError(
            f"{name} needs the model's tokenizer for its instruction, but {model.config.name_or_path!r} has none: load "
            f"the model from its directory or hub name, or give {instead or f'the token ids as {name}:tokens=1|2|3'}."
        ) from problem


@functools.lru_cache(maxsize=16)
def _tokenized(path: str, text: str) -> tuple[int, ...]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return tuple(tokenizer(f"\n{text.strip()}\n", add_special_tokens=False)["input_ids"])


def after_image(call: Call, *tokens: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The call's inputs with `tokens`, or each row's own, after its last image (and its end marker), padded on the left."""
    ids, config = call.inputs["input_ids"], call.model.config
    images = torch.isin(ids, torch.tensor(image_token_ids(call.model, call.family), device=ids.device))
    own = tokens if len(tokens) > 1 else tokens * len(ids)
    inputs = dict(call.inputs)
    for key in [*by_token(inputs), *({"cross_attention_mask"} & inputs.keys())]:
        rows = []
        for i, row in enumerate(inputs[key]):
            where = images[i].nonzero()
            at = int(where[-1]) + 1 if len(where) else 0
            if len(where) and at < len(row) and ids[i, at] == getattr(config, "vision_end_token_id", -1):
                at += 1
            values = {"input_ids": own[i], "attention_mask": (1,) * len(own[i])}
            more = len(own[i]) if len(where) else 0
            if row.dim() > 1:  # new tokens see the tiles that the token before them sees
                new = row[at - 1 : at].expand(more, -1, -1)
            else:
                new = row.new_tensor(values.get(key, (0,) * more) if more else ())
            rows.append(torch.cat([row[:at], new, row[at:]]))
        width = max(map(len, rows))
        rows = [torch.nn.functional.pad(row, (0, 0) * (row.dim() - 1) + (width - len(row), 0)) for row in rows]
        inputs[key] = torch.stack(rows)
    return inputs
