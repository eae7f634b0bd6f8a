"""Edits of the next-token distribution that need no second branch, as a logits processor.

Like the contrast, it acts at each call on what it is given (rows, generated tokens), so that greedy, sampling, beam
search, streaming and assisted decoding are all the same to it.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import LogitsProcessor

from vlm_fix.families.table import image_token_ids
from vlm_fix.options import GenerateOptions
from vlm_fix.session import Call, Session
from vlm_fix.wing import Host, Wing

from .kinds import LogitEdit


@dataclass(frozen=True)
class Step:
    """What a `LogitEdit` sees beside the distribution: B' rows (beams and samples lie beside their prompt)."""

    processor: LogitEdits
    generated: torch.Tensor  # [B', t]

    @property
    def index(self) -> int:
        """Number of generated tokens."""
        return self.generated.shape[1]

    @property
    def session(self) -> Session | None:
        """The main branch's session, with what an edit that is an AttentionEdit too has seen; None before the prompt."""
        return self.processor.host.main

    def seeds(self, seed: int) -> list[int]:
        """One per row, from `seed`, the row's images and tokens: the same whatever else is in the batch."""
        base = self.processor.prompts
        times = len(self.generated) // len(base)
        rows = self.generated.cpu().numpy()
        return [zlib.crc32(f"{seed},{base[i // times]}".encode() + row.tobytes()) for i, row in enumerate(rows)]

    def reached(self, layer: int) -> bool:
        """False for a token that the model has not seen yet: drafting tries its proposals on made-up scores first."""
        rows, first = self.processor.seen.get(layer, (None, 0))
        return rows is not None and self.index - first < rows.shape[1]

    def exit(self, layer: int, norm: bool) -> torch.Tensor:
        """[B', V] float32 logits of the input of `layer`, through the final norm (if asked) and the language head."""
        host, (rows, first) = self.processor.host, self.processor.seen[layer]
        x = rows[:, self.index - first]
        return host.model.lm_head(host.language.norm(x) if norm else x).float()


class LogitEdits(LogitsProcessor):
    """Applies `edits` in order to the scores [B', V], renormalised; keeps the hidden states they ask for."""

    def __init__(self, host: Host, edits: list[LogitEdit], call: Call):
        self.host, self.edits, self.call = host, edits, call
        self.seen: dict[
            int, tuple[torch.Tensor, int]
        ] = {}  # layer -> rows [B', n, C], generated tokens before the first
        self.handles = [
            host.language.layers[i].register_forward_pre_hook(functools.partial(self._see, i), with_kwargs=True)
            for i in sorted({i for e in edits for i in e.exits})
        ]

    def close(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = Step(self, input_ids[:, self.call.inputs["input_ids"].shape[1] :])
        l = scores.float().log_softmax(dim=-1)
        for edit in (e for e in self.edits if all(map(step.reached, e.exits))):
            l = edit.edit(l, step).log_softmax(dim=-1)
        return l.to(scores.dtype)  # type: ignore[return-value]

    def _see(self, layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep the rows that predict new tokens: one, or several while drafted tokens are checked."""
        session = self.host.editing
        if session is None or session.branch != "main":
            return
        x = (args[0] if args else kwargs["hidden_states"])[: session.types.shape[0]]  # without joined branches
        first = session.start - (session.prompt_len - 1)
        count = session.length + min(first, 0)  # from the end: dropped tokens came before
        self.seen[layer] = x[:, x.shape[1] - count :].detach().clone(), max(first, 0)

    @functools.cached_property
    def prompts(self) -> list[int]:
        return fingerprints(self.call)


class LogitWing(Wing):
    """The edits of the next-token distribution, applied after any contrast."""

    order = 50

    def __init__(self, host: Host):
        super().__init__(host)
        self.edits = [m for m in host.active if isinstance(m, LogitEdit)]

    @classmethod
    def claim(cls, host: Host) -> Self | None:
        wing = cls(host)
        return wing if wing.edits else None

    def one_graph(self, rows: int) -> bool:
        return not any(edit.exits for edit in self.edits)

    @contextlib.contextmanager
    def around_generate(self, call: Call, options: GenerateOptions) -> Iterator[None]:
        processor = LogitEdits(self.host, self.edits, call)
        options.processors.append(processor)
        try:
            yield
        finally:
            processor.close()


def fingerprints(call: Call) -> list[int]:
    """A checksum of each prompt: its images' pixels and its tokens without padding."""
    ids, mask = call.inputs["input_ids"], call.inputs["attention_mask"].bool()
    sums = [zlib.crc32(row[keep].cpu().numpy().tobytes()) for row, keep in zip(ids, mask, strict=True)]
    pixels, grid = call.inputs.get("pixel_values"), call.inputs.get("image_grid_thw")
    if pixels is None or not len(pixels):
        return sums
    images = pixels.split(1) if grid is None else pixels.split(grid.prod(dim=-1).tolist())
    token = image_token_ids(call.model, call.family)[0]
    ends = ((ids == token) & mask).sum(dim=1).cumsum(dim=0).cpu()  # an image has tokens in proportion to its pixels
    share, start = float(ends[-1]) / sum(map(len, images)), 0
    for image in images:
        row = int(torch.searchsorted(ends, (start + len(image) / 2) * share, right=True))
        if row < len(sums):
            sums[row] = zlib.crc32(image.detach().float().cpu().contiguous().numpy().tobytes(), sums[row])
        start += len(image)
    return sums
