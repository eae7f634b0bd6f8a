"""generate on a prompt that a Procedure made longer: to its caller it looks as if the prompt were as it was given.

The new tokens of all rows begin in one column, so either prompt can stand before them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class Prompt:
    """given [B, L]: the caller's token ids; used [B, L']: those that the model gets."""

    def __init__(self, given: torch.Tensor, used: torch.Tensor):
        self.given, self.start, self.longer = given, used.shape[1], used is not given

    def put_back(self, ids: torch.Tensor) -> torch.Tensor:
        """[n B, L' + t] -> [n B, L + t], with the caller's prompt before the t new tokens."""
        own = self.given.repeat_interleave(len(ids) // len(self.given), dim=0).to(ids.device)
        return torch.cat([own, ids[:, self.start :]], dim=1)

    def restored(self, output: Any) -> Any:
        """What generate returned, with the caller's prompt in its sequences."""
        if not self.longer:
            return output
        if isinstance(output, torch.Tensor):
            return self.put_back(output)
        output.sequences = self.put_back(output.sequences)
        return output

    def keep(self, kwargs: dict[str, Any], setting: Callable[[str], Any]) -> dict[str, Any]:
        """The options of generate that speak of the prompt, for the longer one; setting(name): what is set for one."""
        new: dict[str, Any] = {}
        for name in ("max_length", "min_length"):
            if setting(name) is not None:
                new[name] = setting(name) + self.start - self.given.shape[1]
        for name, kind in (("logits_processor", LogitsProcessorList), ("stopping_criteria", StoppingCriteriaList)):
            if kwargs.get(name):
                new[name] = kind(_Given(self, inner) for inner in kwargs[name])
        if allowed := kwargs.get("prefix_allowed_tokens_fn"):
            new["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
                row, torch.cat([self.given[row].to(ids.device), ids[self.start :]])
            )
        if kwargs.get("streamer") is not None:
            new["streamer"] = _Streamer(self, kwargs["streamer"])
        return new


class _Given:
    """A logits processor or stopping criterion of the caller's."""

    def __init__(self, prompt: Prompt, inner: Callable[..., Any]):
        self.prompt, self.inner = prompt, inner

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> Any:
        return self.inner(self.prompt.put_back(input_ids), scores)


class _Streamer(BaseStreamer):
    """Its first piece is the prompt."""

    def __init__(self, prompt: Prompt, inner: Any):
        self.prompt, self.inner, self.begun = prompt, inner, False

    def put(self, value: torch.Tensor) -> None:
        self.inner.put(value if self.begun else self.prompt.put_back(value))
        self.begun = True

    def end(self) -> None:
        self.inner.end()
