"""Yes threshold: a rule that turns unsure answers into "yes". A control."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix import VlmFixError, param
from vlm_fix.decoding.kinds import LogitEdit
from vlm_fix.decoding.step import Step


@dataclass(frozen=True)
class YesThreshold(LogitEdit):
    """Control: answers "yes" wherever the model is torn between yes and no, and knows nothing new.

    On the first token of the answer: if p(yes) + p(no) > mass and |p(yes) - p(no)| < margin, the likelier of the yes
    tokens is forced. A one-way shift like this lifts accuracy wherever a model says "no" too often.

    Source: the output-layer control (OLM) of ustc-hyin/cd_rethink@8a77ad1 (mass .2, margin .5).
    Deviations: the official code knows LLaVA's ids of "Yes" and "No" alone; here p(yes) sums over the spellings Yes and
    yes, with and without a space before, that the tokenizer in the model's directory holds as one token (or over the
    ids given as `yes` and `no`). The official code applies the rule at every token, this at the first. margin = 0 is
    the plain model.
    """

    name: ClassVar[str] = "yes_threshold"
    kind: ClassVar[str] = "control"
    on_logits: ClassVar[bool] = True
    gated: ClassVar[bool] = True

    mass: float = param(0.2, "p(yes) + p(no) above which the answer counts as yes or no", low=0, high=1)
    margin: float = param(0.5, "|p(yes) - p(no)| below which it becomes yes", low=0, high=1)
    yes: tuple[int, ...] | None = param(None, "token ids of yes", of="token ids")
    no: tuple[int, ...] | None = param(None, "token ids of no", of="token ids")

    @property
    def neutral(self) -> bool:
        return self.margin == 0

    def edit(self, l: torch.Tensor, step: Step) -> torch.Tensor:
        if step.index:
            return l
        model = step.host.model
        return self.forced(l, self.yes or spellings(model, "Yes"), self.no or spellings(model, "No"))

    def forced(self, l: torch.Tensor, yes: tuple[int, ...], no: tuple[int, ...]) -> torch.Tensor:
        """Logits [B, V] of the first token -> the same, or 0 for yes and -inf for all others."""
        p_yes, p_no = (l.softmax(dim=-1)[:, list(ids)].sum(dim=-1) for ids in (yes, no))
        torn = (p_yes + p_no > self.mass) & ((p_yes - p_no).abs() < self.margin) & (p_yes > 0)
        best = torch.tensor(yes, device=l.device)[l[:, list(yes)].argmax(dim=-1)]
        only = torch.full_like(l, -torch.inf).scatter(1, best[:, None], 0.0)
        return torch.where(torn[:, None], only, l)


def spellings(model: Any, word: str) -> tuple[int, ...]:
    """Ids of the one-token spellings of `word`; VlmFixError if the tokenizer is not to be had or holds none."""
    try:
        found = _spellings(model.config.name_or_path, word)
    except (OSError, ValueError) as problem:
        raise VlmFixError(
            f"yes_threshold needs the model's tokenizer, but {model.config.name_or_path!r} has none: load the model from "
            "its directory or hub name, or give the token ids as yes_threshold:yes=3869,no=1939."
        ) from problem
    if not found:
        raise VlmFixError(
            f"the model's tokenizer has no token for {word!r}; give the ids as yes_threshold:yes=3869,no=1939."
        )
    return found


@functools.lru_cache(maxsize=16)
def _spellings(path: str, word: str) -> tuple[int, ...]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    texts = (space + w for space in ("", " ") for w in (word, word.lower()))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return tuple(sorted({i[0] for i in ids if len(i) == 1 and i[0] != tokenizer.unk_token_id}))
