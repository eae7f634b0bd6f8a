"""The answer that `observe` is given: token ids, the output of `generate`, or text."""

from __future__ import annotations

from typing import Any

import torch

from vlm_fix.errors import VlmFixError


def answer_of(answer: Any, prompt: torch.Tensor, model: Any, tokenizer: Any, images: torch.Tensor) -> torch.Tensor:
    """[n] the answer's token ids on the prompt's device.

    answer: ids [n] or [1, n]; what `generate` returned, whose prompt [1, L] is taken off; text, for which `tokenizer` (or a
    processor) is needed unless the model's folder has one; None: no answer. images: ids of image tokens, which no answer has.
    """
    if answer is None:
        answer = []
    elif isinstance(answer, str):
        encode = _tokenizer(model, tokenizer)
        answer = encode(answer, add_special_tokens=False)["input_ids"]
    elif getattr(answer, "sequences", None) is not None:
        answer = answer.sequences
    try:
        ids = torch.as_tensor(answer, dtype=torch.long, device=prompt.device)
    except (TypeError, ValueError, RuntimeError):
        raise VlmFixError(
            f"the answer must be token ids, what generate returned, or text, not {answer!r:.60}."
        ) from None
    if ids.dim() > 1 and ids.shape[0] != 1:
        raise VlmFixError(f"observe takes one answer at a time, not {ids.shape[0]}: pass one row, such as output[:1].")
    ids = ids.flatten()
    length = prompt.shape[1]
    if len(ids) >= length and torch.equal(ids[:length], prompt[0]):
        ids = ids[length:]
    if bool(torch.isin(ids, images.to(ids.device)).any()):
        raise VlmFixError(
            "the answer holds image tokens, so it begins with another prompt than inputs: pass the new tokens alone, "
            "output[:, prompt_length:]."
        )
    return ids


def _tokenizer(model: Any, given: Any) -> Any:
    if given is not None:
        return getattr(given, "tokenizer", given)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True)
    except Exception:  # whatever is missing there
        raise VlmFixError("an answer as text needs its tokenizer: observe(..., tokenizer=processor).") from None
