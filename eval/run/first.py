"""The probabilities of yes and no as the first token of an answer, read from the step that chooses it.

They are of the distribution from which the token is drawn: after methods (also a contrast's branches) and after `generate`'s
own processors, such as a repetition penalty, and before temperature, top_k and top_p. Beam search: of the prompt. No forward
pass is added. p_yes is the sum over all tokens that are "yes" but for case and a space before it, p_no likewise.

>>> yes_no_tokens(["▁Yes", "yes", "ĠYES", "yes!", "No", "▁not", None])
{'yes': {'▁Yes': 0, 'yes': 1, 'ĠYES': 2}, 'no': {'No': 4}}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

SPACES = "▁Ġ "  # as SentencePiece and byte-level vocabularies write it
WORDS = ("yes", "no")


def yes_no_tokens(vocabulary: Sequence[str | None]) -> dict[str, dict[str, int]]:
    """Return word -> {token: id} of the tokens that are this word; `vocabulary` has the tokens in the order of their ids."""
    found: dict[str, dict[str, int]] = {word: {} for word in WORDS}
    for id, token in enumerate(vocabulary):
        if token and (word := token.strip(SPACES).lower()) in found:
            found[word].setdefault(token, id)
    return found


def tokens_of(tokenizer: Any) -> dict[str, dict[str, int]]:
    """Return the same of a tokenizer."""
    if (known := tokenizer.__dict__.get("_vlm_fix_yes_no")) is None:
        known = yes_no_tokens(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        tokenizer.__dict__["_vlm_fix_yes_no"] = known
    return known


class FirstToken(LogitsProcessor):
    """Reads the scores of the first step, and changes nothing. `found` is [B, 2], p_yes and p_no; None where no token is "yes"
    or none is "no"."""

    reads_only = True

    def __init__(self, tokens: dict[str, dict[str, int]], prompts: int, beams: int) -> None:
        self.ids = [[*tokens[word].values()] for word in WORDS]
        self.prompts, self.beams, self.called = prompts, beams, False
        self.found: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not self.called and all(self.ids):
            p = scores[:: self.beams].detach().float().softmax(dim=-1)
            if len(p) == self.prompts:  # drafted tokens are scored one by one
                self.found = torch.stack([p[:, ids].sum(dim=-1) for ids in self.ids], dim=-1)
        self.called = True
        return scores

    def probabilities(self) -> list[tuple[float, float]] | None:
        """(p_yes, p_no) of each prompt to 7 digits, or None."""
        if self.found is None:
            return None
        return [(float(f"{yes:.7g}"), float(f"{no:.7g}")) for yes, no in self.found.tolist()]
