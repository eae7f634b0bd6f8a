"""The sessions of served requests: one for each request, and one for the decode rows of many."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from vlm_fix.attention.edits import Changes
from vlm_fix.call import Call
from vlm_fix.memory import ColumnCache, ForwardCache, Memory
from vlm_fix.session import SLACK, TEXT, VISUAL, Session


def session_of(call: Call, types: torch.Tensor, branch: str = "main") -> RequestSession:
    """The session of a prompt whose columns have the types [1, L]."""
    columns = types[0] == VISUAL
    made = RequestSession(call, prompt_len=types.shape[1], branch=branch)
    made.prompt, made.last_visual = types, [int(columns.nonzero()[-1]) if bool(columns.any()) else -1]
    return made


@dataclasses.dataclass
class RequestSession(Session):
    """One request. All of its prompt is known from the start, also where it comes in chunks."""

    prompt: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(1, 0, dtype=torch.uint8))

    moved: set[Any] = dataclasses.field(default_factory=set)  # edits that changed rows of it among those of others

    def go_to(self, start: int, length: int) -> None:
        """The next forward has `length` rows from column `start` on."""
        total = start + length
        self.start, self.length = start, length
        self.types = self.wide(total)[:, :total]
        self.forward, self.columns = ForwardCache(), ColumnCache()

    def wide(self, width: int) -> torch.Tensor:
        """[1, n] types of `width` columns or more: what follows the prompt is text."""
        return torch.nn.functional.pad(self.prompt, (0, max(0, width - self.prompt.shape[1])), value=TEXT)


class BatchSession(Session):
    """The decode rows of several requests, each in its own last column.

    Columns lie left-aligned, so that those of a shorter request end earlier: its row may not look further. Nothing in it
    is `prompt_len` long: the prompts' lengths are in `prompts`.
    """

    def __init__(self, sessions: Sequence[RequestSession]):
        first = sessions[0]
        super().__init__(joint_call(sessions), prompt_len=0, branch=first.branch)
        self.sessions = list(sessions)
        self.last_visual = [s.last_visual[0] for s in sessions]
        self.prompts = torch.tensor([s.prompt_len for s in sessions])
        self.lengths, self.shortest = self.prompts, 0
        self.states = joined([s.states for s in sessions])
        self.all_types = torch.zeros(len(sessions), 0, dtype=torch.uint8)
        self.spare: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def go_to(self, lengths: Sequence[int]) -> None:
        """The next forward has one row for each request, which then has `lengths` columns."""
        total = max(lengths)
        if self.all_types.shape[1] < total:
            width = total + SLACK
            self.all_types = torch.cat([s.wide(width)[:, :width] for s in self.sessions])
            self.columns = ColumnCache()
        self.start, self.length, self.types = total - 1, 1, self.all_types[:, :total]
        self.shortest = min(lengths)
        self.forward, self.lengths, self.spare = ForwardCache(), torch.tensor(lengths), {}

    def settle(self, edits: Sequence[Any]) -> None:
        """Note in each request which of the edits changed any row here."""
        for edit in edits:
            if edit.changed_something(self):
                for session in self.sessions:
                    session.moved.add(edit)

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self.spare:
            self.spare[device] = self.lengths.to(device), self.prompts.to(device)
        return self.spare[device]

    def ages(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        lengths, _ = self._on(rows.device)
        return (lengths[:, None] - 1 - torch.arange(width, device=rows.device))[:, None, None]

    def generated(self, width: int, device: torch.device) -> torch.Tensor:
        lengths, prompts = self._on(device)
        columns = torch.arange(width, device=device)
        return ((columns >= prompts[:, None]) & (columns < lengths[:, None]))[:, None, None]

    def seen(self, width: int, device: torch.device) -> torch.Tensor | None:
        """[B, 1, 1, K] True where a row may look; None if all see all."""
        if self.shortest >= width:
            return None
        lengths, _ = self._on(device)
        return (torch.arange(width, device=device) < lengths[:, None])[:, None, None]

    def clear(self, *stores: torch.Tensor) -> None:
        """Zeros in stores [B, H, K, D] behind each request's end: there lies what is another's, or nothing yet."""
        for x in stores:
            if self.shortest >= x.shape[2]:
                continue
            if x.is_cuda:
                seen = self.seen(x.shape[2], x.device)
                assert seen is not None
                x.masked_fill_(~seen.transpose(2, 3), 0)
            else:
                for row, length in zip(x, self.lengths.tolist(), strict=True):
                    row[:, length:] = 0


class LastRows(BatchSession):
    """The last rows of several prompts, each the row that predicts its first token. `share` gives the requests their own."""

    def __init__(self, sessions: Sequence[RequestSession]):
        super().__init__(sessions)
        lengths = [s.prompt_len for s in sessions]
        self.go_to(lengths)
        self.prompt_len = max(lengths)

    def share(self) -> None:
        """Let each request remember what methods noted here."""
        _share(self.states, self.sessions)


class WholePrompts(Session):
    """Several prompts of the same length with all their rows, as a batch without padding has them."""

    def __init__(self, sessions: Sequence[RequestSession]):
        first = sessions[0]
        super().__init__(joint_call(sessions), prompt_len=first.prompt_len, branch=first.branch)
        self.sessions = list(sessions)
        self.last_visual = [s.last_visual[0] for s in sessions]
        self.types = torch.cat([s.prompt for s in sessions])
        self.start, self.length = 0, first.prompt_len
        self.states = joined([s.states for s in sessions])

    def share(self) -> None:
        """As that of `LastRows`."""
        _share(self.states, self.sessions)


def joint_call(sessions: Sequence[RequestSession]) -> Call:
    """A call with the prompts of all, if they are of one length; else the first one's, of which nothing reads the words."""
    first = sessions[0].call
    ids = [session.call.inputs["input_ids"] for session in sessions]
    if len({x.shape[1] for x in ids}) > 1:
        return first
    joined = torch.cat(ids)
    return Call(first.model, first.family, {"input_ids": joined, "attention_mask": torch.ones_like(joined)})


def _share(states: dict[Any, Any], sessions: Sequence[RequestSession]) -> None:
    for i, session in enumerate(sessions):
        session.states.update(row_of(states, i))


def row_of(value: Any, i: int) -> Any:
    """Of what a batch remembers, [B, ...], the part of request i, [1, ...]: what `joined` puts together."""
    if isinstance(value, torch.Tensor) and value.dim():
        return value[i : i + 1]
    if isinstance(value, dict):
        return {k: row_of(v, i) for k, v in value.items()}
    if isinstance(value, Changes):  # of the batch as a whole
        return Changes(dict(value.in_layer), value.in_decode_rows)
    if isinstance(value, Memory):
        names = [f.name for f in dataclasses.fields(value)]
        return type(value)(**{n: row_of(getattr(value, n), i) for n in names})
    return value


def joined(values: Sequence[Any]) -> Any:
    """What single requests remember, [1, ...] each, as what a batch of them remembers, [B, ...].

    Tensors are filled with zeros up to the largest: a column's memory says nothing of columns that came later.
    """
    values = [None if isinstance(v, torch.Tensor) and v.dim() and not v.numel() else v for v in values]  # not used yet
    known = [v for v in values if v is not None]
    if not known:
        return None
    first = known[0]
    if isinstance(first, torch.Tensor) and first.dim():
        shape = [max(sizes) for sizes in zip(*(v.shape[1:] for v in known), strict=True)]
        out = first.new_zeros(len(values), *shape)
        for row, value in zip(out, values, strict=True):
            if value is not None:
                row[tuple(slice(n) for n in value.shape[1:])] = value[0]
        return out
    if isinstance(first, dict):
        keys = dict.fromkeys(k for v in known for k in v)
        return {k: joined([(v or {}).get(k) for v in values]) for k in keys}
    if isinstance(first, Changes):
        return Changes()
    if isinstance(first, Memory):
        names = [f.name for f in dataclasses.fields(first)]
        found = {n: joined([v and getattr(v, n) for v in values]) for n in names}
        return type(first)(**{n: x for n, x in found.items() if x is not None})
    return first
