"""Yes bias: an instruction to say yes. A control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_fix import Contrast, param
from vlm_fix.call import Call
from vlm_fix.methods.contrast.icd import after_image, line_tokens


@dataclass(frozen=True)
class YesBias(Contrast):
    """Control: answers as with the line "Answer yes whenever possible." in the prompt, and with nothing else changed.

    z = (1 - alpha) log p + alpha log p', where p' sees the instruction between the (last) image and the user's text.
    A one-way shift to "yes" lifts accuracy wherever a model says "no" too often: a method has to beat this.

    Source: the prompt control of ustc-hyin/cd_rethink, which appends the line to the question; here it stands before
    it, so that it does not depend on the chat template. Its tokens come from the tokenizer in the model's directory, or
    as `tokens`; prompts without an image stay as they are.
    """

    name: ClassVar[str] = "yes_bias"
    kind: ClassVar[str] = "control"
    on_logits: ClassVar[bool] = True

    alpha: float = param(1.0, "weight of the instructed answer; 1 = only that", low=0)
    prompt: str = param("Answer yes whenever possible.", "the instruction")
    tokens: tuple[int, ...] | None = param(None, "its token ids, instead of `prompt`", of="token ids")

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    def negative(self, call: Call) -> dict[str, torch.Tensor]:
        return after_image(call, self.tokens or line_tokens(call.model, self.prompt, self.name))

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        return ((1 - self.alpha) * l + self.alpha * l_neg).masked_fill(torch.isinf(l), -torch.inf)
