"""The state of one call. A Call is one `generate` (or bare forward); a Session is one KV cache inside it.

A contrast method has two sessions in one call (main and negative branch). Sessions are found by their cache, so nothing
outlives it, and a caller who reuses a cache for the next turn keeps the state that belongs to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.memory import ColumnCache, ForwardCache, Memory, with_rows
from vlm_fix.method import Method
from vlm_fix.packing import pad_to
from vlm_fix.scope import RowRange, RowScope

T = TypeVar("T")
M = TypeVar("M", bound=Memory)

PAD, TEXT, VISUAL = 0, 1, 2
SLACK = 256  # generated columns for which masks are made in advance


@dataclass
class Session:
    """Columns of one cache: `types` [B, n] says for each column whether it is padding, text or visual."""

    call: Call
    prompt_len: int  # in language-model columns; rows from prompt_len - 1 on predict new tokens
    branch: str = "main"
    types: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.uint8))
    start: int = 0  # absolute position of the first query row of this forward
    length: int = 0  # query rows of this forward
    last_visual: list[int] = field(default_factory=list)  # per sample, -1 without an image
    kept: Any = None  # pruning.before.Kept, once visual tokens were dropped
    views: dict[int, View] = field(default_factory=dict)  # layer -> the columns it still has, where some were dropped
    states: dict[Any, Any] = field(default_factory=dict)  # see `memory`
    plain: bool = False  # no edits: a pass that only observes
    answer: torch.Tensor | None = None  # second branch: [B', t] ids of the columns after the prompt
    parts: dict[type, Any] = field(default_factory=dict)  # what wings keep here, each in a class of its own
    forward: ForwardCache = field(default_factory=ForwardCache)
    columns: ColumnCache = field(default_factory=ColumnCache)
    cache: Any = None  # a weak reference to the KV cache, once there is one

    def memory(self, method: Method, kind: type[M], layer: int | None = None) -> M:
        """What `method` remembers in this session (of a layer, if given), as a `kind` of Memory; made on first use."""
        key = id(method), kind, layer
        if key not in self.states:
            self.states[key] = kind()
        return self.states[key]

    def forget(self, method: Method) -> None:
        """Drop everything that is remembered for `method`."""
        for key in [k for k in self.states if k[0] == id(method)]:
            del self.states[key]

    @property
    def padded(self) -> bool:
        """True if some columns are padding; asked once, since generated columns are none."""
        if self.columns.padded is None:
            self.columns.padded = bool((self.types == PAD).any())
        return self.columns.padded

    @property
    def fresh(self) -> bool:
        """True before the first forward."""
        return not self.types.numel()

    def predicts(self, index: int) -> bool:
        """True if this forward holds the row that predicts generated token `index`."""
        return max(self.start, self.prompt_len - 1) <= self.prompt_len - 1 + index < self.start + self.length

    def part(self, cls: type[T]) -> T:
        """A wing's own state in this session, made when first asked for."""
        if cls not in self.parts:
            self.parts[cls] = cls()
        return self.parts[cls]

    def advance(self, past: int, types: torch.Tensor, text: bool = False) -> None:
        """Note the columns of a new forward after `past` cached ones (a shorter past drops what was rolled back).

        text: the new columns are known to be TEXT, so that nobody has to wait for the device to say so.
        """
        if not self.fresh and past:
            if self.types.shape[0] != types.shape[0]:  # a cache that was expanded for beams or several samples
                self.repeat(types.shape[0] // self.types.shape[0])
            for view in {id(v): v for v in self.views.values()}.values():
                view.prompt_len = self.prompt_len - view.dropped
                view.advance(past - view.dropped, types, text)
            types = torch.cat([self.types[:, :past], types], dim=1)
        if not past:
            self.views.clear()
        self.types, self.start, self.length = types, past, types.shape[1] - past
        images_stay = past > max(self.last_visual, default=-1)  # a cache may be cut back behind, or through, an image
        grown = past > 0 and images_stay and (text or bool((types[:, past:] == TEXT).all()))
        self.forward = ForwardCache()
        self.columns = self.columns if grown else ColumnCache()
        if past == 0 or not grown:
            columns = torch.arange(types.shape[1], device=types.device)
            self.last_visual = torch.where(types == VISUAL, columns, -1).amax(dim=1).tolist()

    def repeat(self, times: int) -> None:
        """Repeat every row `times` times in place, like a beam search does with its inputs."""

        def grow(value: Any) -> Any:
            return with_rows(value, lambda x: x.repeat_interleave(times, dim=0))

        states = grow(self.states)
        for session in {id(s): s for s in (self, *self.views.values())}.values():
            session.states = states
            session.types = grow(session.types)
            session.forward, session.columns = ForwardCache(), ColumnCache()
            session.last_visual = [v for v in session.last_visual for _ in range(times)]
            if isinstance(session, View):
                session.index = grow(session.index)
        if self.kept:
            self.kept.repeat(times)

    def need_whole_prompt(self, name: str) -> None:
        """Raises VlmFixError if this forward holds only a part of the prompt."""
        if self.start + self.length < self.prompt_len:
            raise VlmFixError(f"{name} needs the whole prompt in one forward; drop prefill_chunk_size.")

    def on_images(self, values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """values [N], one for each image token of the prompts in order -> [B, n], each on its column, 0 elsewhere.

        tokens: the ids of image tokens. On a kept cache the values may be those of the new images alone. Raises
        VlmFixError if N does not fit the prompts.
        """
        ids = self.call.inputs["input_ids"]
        image = torch.isin(ids, tokens.to(ids.device))
        if len(values) < int(image.sum()):  # an earlier turn's images were seen in that turn
            image = image & (torch.arange(ids.shape[1], device=ids.device) >= self.start)
        count, times = int(image.sum()), self.types.shape[0] // len(ids)
        if len(values) == times * count != count:  # generate before transformers 5.18 runs the tower once per beam
            image = image.repeat_interleave(times, dim=0)
        elif len(values) != count:
            raise VlmFixError(
                f"the prompt holds {count} image tokens, but the vision tower made {len(values)}; pass pixel_values of "
                "every image (no video, no pre-computed features) with vision_feature_select_strategy='default'."
            )
        full = torch.zeros(image.shape, dtype=values.dtype, device=ids.device).masked_scatter(
            image, values.to(ids.device)
        )
        return self.on_columns(full)

    def on_columns(self, full: torch.Tensor) -> torch.Tensor:
        """[prompts, L] over the prompts as the user gave them -> [B, n]: repeated for beams, without pruned columns."""
        full = full.repeat_interleave(self.types.shape[0] // len(full), dim=0)
        full = full.gather(1, self.kept.index.to(full.device)) if self.kept else full
        return pad_to(full[:, : self.types.shape[1]], self.types.shape[1])

    def take(self, rows: torch.Tensor) -> Session:
        """A session of the given rows, for a cache that was copied row by row."""

        def pick(value: Any) -> Any:
            return with_rows(value, lambda x: x.index_select(0, rows.to(x.device)))

        def copy(session: Session, **changes: Any) -> Any:
            last = [session.last_visual[i] for i in rows.tolist()]
            changes |= {"types": pick(session.types), "last_visual": last, "parts": dict(session.parts)}
            return dataclasses.replace(session, forward=ForwardCache(), columns=ColumnCache(), **changes)

        return self._with_views(copy, pick, kept=self.kept and self.kept.take(rows))

    def copied(self) -> Session:
        """The session as it is now, whatever comes: the tensors are the same, what holds them is not."""

        def same(value: Any) -> Any:
            return with_rows(value, lambda x: x)

        def copy(session: Session, **changes: Any) -> Any:
            forward, columns = session.forward.copied(), session.columns.copied()
            return dataclasses.replace(session, parts=dict(session.parts), forward=forward, columns=columns, **changes)

        return self._with_views(copy, same, kept=self.kept and dataclasses.replace(self.kept))

    def _with_views(self, copy: Callable[..., Any], pick: Callable[[Any], Any], **changes: Any) -> Session:
        """A copy whose views are copies too, over the same states."""
        new, copies = copy(self, states=pick(self.states), views={}, **changes), dict[int, View]()
        for layer, view in self.views.items():
            if id(view) not in copies:
                copies[id(view)] = copy(view, states=new.states, parent=new, index=pick(view.index))
            new.views[layer] = copies[id(view)]
        return new

    @property
    def whole(self) -> Session:
        """The session with all columns."""
        return self

    def at(self, layer: int) -> Session:
        """The session as `layer` sees it: other columns, if tokens were dropped before it; the same states."""
        return self.views.get(layer, self)

    def drop(self, layers: Iterable[int], index: torch.Tensor, mask: torch.Tensor, rows: bool = True) -> View:
        """From now on `layers` have only the columns `index` [B, n] of what the first of them had (mask: not padding).

        rows: this forward's hidden states lose them too, not only the cache.
        """
        layers = list(layers)
        before = self.at(layers[0])
        types = torch.where(mask, before.types.gather(1, index), PAD).to(before.types.dtype)
        return self.show(layers, before.places().gather(1, index), types, rows)

    def show(self, layers: Iterable[int], places: torch.Tensor, types: torch.Tensor, rows: bool = True) -> View:
        """From now on `layers` have the columns `places` [B, n] of the whole session, with `types` [B, n]; see `drop`."""
        dropped = self.types.shape[1] - places.shape[1]
        view = View(
            self.call,
            self.prompt_len - dropped,
            self.branch,
            states=self.states,
            parent=self,
            index=places,
            dropped=dropped,
            plain=self.plain,
        )
        view.advance(0, types)
        if not rows:
            view.start, view.length = self.start - dropped, self.length
        self.views.update(dict.fromkeys(layers, view))
        return view

    def places(self) -> torch.Tensor:
        """[B, n] the whole session's column that each column is."""
        return torch.arange(self.types.shape[1], device=self.types.device).expand_as(self.types)

    def translate(self, mask: torch.Tensor, made: Session) -> torch.Tensor:
        """[B, m] over the columns of `made` -> over this session's columns; 0 for those that `made` does not have."""
        if made is self:
            return mask
        if isinstance(made, View):
            n = made.index.shape[1]
            prompt = mask.new_zeros(len(mask), n + made.dropped).scatter(1, made.index, pad_to(mask, n)[:, :n])
            mask = torch.cat([prompt, mask[:, n:]], dim=1)
        if isinstance(self, View):
            n, full = self.index.shape[1], self.index.shape[1] + self.dropped
            prompt = pad_to(mask, max(full, mask.shape[1]))[:, :full].gather(1, self.index.to(mask.device))
            prompt = prompt * (self.types[:, :n] != PAD).to(prompt)
            mask = torch.cat([prompt.to(mask.dtype), mask[:, full:]], dim=1)
        return mask

    def ids(self) -> torch.Tensor:
        """[B', n] token ids of the columns; the prompt's alone in the main branch."""
        ids = self.call.inputs["input_ids"]
        ids = ids.repeat_interleave(len(self.types) // len(ids), dim=0)
        ids = ids.gather(1, self.kept.index) if self.kept else ids
        return (ids if self.answer is None else torch.cat([ids, self.answer], dim=1))[:, : self.types.shape[1]]

    def masks(self, width: int, device: torch.device) -> dict[str, torch.Tensor]:
        """[B, 1, 1, width] boolean masks of the columns an attention layer sees: visual, before, after (text)."""
        total = self.types.shape[1]
        if (width, device) not in self.forward.kinds:
            wide = self.columns.kinds.get(device)
            if wide is None or wide["visual"].shape[-1] < total or width > total:
                # generated columns are text: masks of the next SLACK steps are made at once. A cache's unused end is not.
                slack, kind = (SLACK, TEXT) if width <= total else (width - total, PAD)
                types = torch.nn.functional.pad(self.types, (0, slack), value=kind)
                visual, text = types == VISUAL, types == TEXT
                later = torch.arange(types.shape[1], device=types.device) > torch.tensor(
                    self.last_visual, device=types.device
                ).unsqueeze(1)
                any_image = torch.tensor([v >= 0 for v in self.last_visual], device=types.device)[:, None]
                before = text & ~later & (visual.cumsum(1) == 0)
                made = {"visual": visual, "before": before, "after": text & later & any_image}
                wide = {k: v[:, None, None].to(device) for k, v in made.items()}
                if width <= total:
                    self.columns.kinds[device] = wide
            offset = max(0, total - width)  # sliding-window layers keep only the newest columns
            self.forward.kinds[width, device] = {k: v[..., offset : offset + width] for k, v in wide.items()}
        return self.forward.kinds[width, device]

    def ages(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        """How many columns lie between a row's own and each column: [R, K], 0 for its own, negative for later ones.

        rows [R]: absolute positions. K = `width` columns, the newest if a sliding window dropped others.
        """
        offset = max(0, self.types.shape[1] - width)
        return rows[:, None] - torch.arange(offset, offset + width, device=rows.device)

    def generated(self, width: int, device: torch.device) -> torch.Tensor:
        """[K] booleans of the columns after the prompt, of the K = `width` newest."""
        offset = max(0, self.types.shape[1] - width)
        return torch.arange(offset, offset + width, device=device) >= self.prompt_len

    def shown(self, device: torch.device) -> torch.Tensor:
        """[B, 1] True for samples with an image, made once while generated columns are added."""
        made = self.columns.shown
        if device not in made:
            made[device] = torch.tensor([v >= 0 for v in self.last_visual], device=device)[:, None]
        return made[device]

    def positions(self, first: int, end: int, device: torch.device) -> torch.Tensor:
        """[end - first] absolute positions of this forward's rows from `first` on, made once."""
        place = (first, end, device)
        if place not in self.forward.positions:
            self.forward.positions[place] = torch.arange(self.start + first, self.start + end, device=device)
        return self.forward.positions[place]

    def rows_in(self, scope: RowScope, needs_image: bool) -> RowRange:
        """The rows of this forward in `scope`; none of the samples without an image if `needs_image`."""
        last, after = self.prompt_len - 1, scope is RowScope.AFTER_IMAGE
        starts = []
        for image in self.last_visual:
            start = 0 if scope is RowScope.ALL else min(image + 1, last) if after else last
            starts.append(self.length if needs_image and image < 0 else max(start - self.start, 0))
        return RowRange(tuple(starts), self.length)


@dataclass
class View(Session):
    """A session in the columns that some layers still have: `dropped` fewer than the whole one's."""

    parent: Session | None = None
    index: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # [B, n] the whole's columns
    dropped: int = 0

    @property
    def whole(self) -> Session:
        assert self.parent is not None
        return self.parent

    def places(self) -> torch.Tensor:
        return torch.cat([self.index, super().places()[:, self.index.shape[1] :] + self.dropped], dim=1)

    def attention_mask(self, device: torch.device) -> torch.Tensor | None:
        """[B, 1, q, K] True where this forward's rows may look; None if that is plain causal attention."""
        if device not in self.forward.allowed:
            mask = None
            if self.padded or (self.start and self.length > 1):
                valid = (self.types != PAD).to(device)
                columns = torch.arange(valid.shape[1], device=device)
                rows = columns[self.start :, None]
                # a row of padding sees itself: no kernel then meets a row without any column
                mask = ((columns <= rows) & valid[:, None] | (columns == rows))[:, None]
            self.forward.allowed[device] = mask
        return self.forward.allowed[device]
