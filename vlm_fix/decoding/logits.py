"""Edits of the next-token distribution that need no second branch, as a logits processor.

Like the contrast, it acts at each call on what it is given (rows, generated tokens), so that greedy, sampling, beam
search, streaming and assisted decoding are all the same to it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Self

import torch
from transformers import LogitsProcessor

from vlm_fix.call import Call
from vlm_fix.hooks import mine
from vlm_fix.method import Method, shaped
from vlm_fix.options import GenerateOptions
from vlm_fix.tensors import one_stream
from vlm_fix.wing import Host, Wing

from .head import Head
from .kinds import LogitEdit, log_probs
from .step import Step, fingerprints


class LogitEdits(LogitsProcessor):
    """Applies `edits` in order to the scores [B', V], which a beam search `adds` up; keeps the hidden states they ask for."""

    def __init__(self, host: Host, edits: list[LogitEdit], call: Call, adds: bool, head: Head):
        self.host, self.edits, self.call, self.adds, self.head = host, edits, call, adds, head
        self.seen: dict[
            int, tuple[torch.Tensor, int]
        ] = {}  # layer -> rows [B', n, C], generated tokens before the first
        layers = host.language.layers
        self.handles = [
            layers[i - 1].register_forward_hook(mine(functools.partial(self._made, i)))
            if hasattr(layers[i], "cross_attn")  # left out of prompts without an image
            else layers[i].register_forward_pre_hook(mine(functools.partial(self._see, i)), with_kwargs=True)
            for i in sorted({i for e in edits for i in e.exits})
        ]
        self.handles += head.hooks() if self.handles else []

    def close(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        generated = input_ids[:, self.call.inputs["input_ids"].shape[1] :]
        main = self.host.main
        if main is None or not main.predicts(generated.shape[1]):
            return scores  # made up: drafting asks which of its proposals are forbidden
        step = Step(self.host, main, lambda: self.prompts, generated, self.seen, self.head)
        z = scores.float()
        for edit in self.edits:
            given = log_probs(z, unless=edit.on_logits and not self.adds)
            new = shaped(edit.edit(given, step), z, edit, "edit")
            if not edit.gated:
                self.host.effects.note(edit, new, given)
            new = log_probs(new, unless=not self.adds)
            blind = edit.needs_image and min(main.last_visual, default=0) < 0  # rows without an image stay as they are
            z = torch.where(main.shown(z.device), new, z) if blind else new
        return z.to(scores.dtype)  # type: ignore[return-value]

    @torch.no_grad()
    def _see(self, layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep the rows that predict new tokens: one, or several while drafted tokens are checked."""
        session = self.host.editing
        if session is None or session.call is not self.call:  # of a second branch, or of the caller's code
            return
        x = one_stream(args[0] if args else kwargs["hidden_states"], " + ".join(e.name for e in self.edits if e.exits))
        samples = session.types.shape[0]
        x = x if len(x) == samples else x[:samples]  # without joined branches
        first = session.start - (session.prompt_len - 1)
        count = session.length + min(first, 0)  # from the end: dropped tokens came before
        rows = x if x.shape[1] == count else x[:, x.shape[1] - count :]
        self.seen[layer] = rows.clone(), max(first, 0)

    def _made(self, layer: int, before: Any, args: Any, output: Any) -> None:
        self._see(layer, before, (output[0] if isinstance(output, tuple) else output,), {})

    @functools.cached_property
    def prompts(self) -> list[int]:
        return fingerprints(self.call)


class LogitWing(Wing):
    """The edits of the next-token distribution, applied after any contrast."""

    order = 50
    runs = (LogitEdit,)

    def __init__(self, host: Host):
        super().__init__(host)
        self.edits = [m for m in host.active if isinstance(m, LogitEdit) and m.edits_logits]
        self.head = Head(host)

    @classmethod
    def claim(cls, host: Host) -> Self | None:
        wing = cls(host)
        return wing if wing.edits else None

    def one_graph(self, rows: int) -> bool:
        return not any(edit.exits for edit in self.edits)

    def only_in_generate(self) -> Iterator[tuple[Method, str]]:
        yield from ((edit, "edit the logits") for edit in self.edits)

    @contextlib.contextmanager
    def around_generate(self, call: Call, options: GenerateOptions) -> Iterator[None]:
        processor = LogitEdits(self.host, self.edits, call, options.beams > 1, self.head)
        call.processors.append(processor)
        try:
            yield
        finally:
            processor.close()
