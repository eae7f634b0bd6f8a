"""A prompt without its images that runs along with the prompt itself: one product with a layer's weights for the rows of both.

Only the rows after the first image are added, behind the prompt's own: what stands before it is the same in both, and so are
its keys. Attention alone runs apart. The added columns leave the cache when the forward ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from vlm_fix.call import Call
from vlm_fix.families import prompt_positions
from vlm_fix.recorder import Done, Recorder
from vlm_fix.session import VISUAL, Session
from vlm_fix.wing import Host

from .edits import AttentionEdit, LayerInputReader
from .preview import goes_on


@dataclass
class Along:
    """`inputs`: the prompt of `main` without images; its `count` last tokens are run in columns of their own.

    Recorders see `heads` of these rows; layers after `recorder.last` are not computed for them.
    """

    host: Host
    main: Session
    inputs: dict[str, torch.Tensor]
    recorder: Recorder
    apart: Callable[[], None]  # runs the prompt without images by itself
    count: int
    session: Session = field(init=False)
    seen: torch.Tensor = field(init=False)  # [1, 1, count, columns] booleans: what the added rows see
    done: bool = False

    def __post_init__(self) -> None:
        ids = self.inputs["input_ids"]
        call = Call(self.host.model, self.host.family, self.inputs)
        self.session = Session(call, prompt_len=ids.shape[1], branch="observe", plain=True)
        self.session.advance(0, self.host.classify(ids[:, : self.shared]))
        self.session.advance(self.shared, self.host.classify(ids[:, self.shared :]))
        self.seen = torch.ones(1, 1, self.count, ids.shape[1], dtype=torch.bool).tril(self.shared)

    @property
    def shared(self) -> int:
        """Columns before the first image."""
        return self.inputs["input_ids"].shape[1] - self.count

    def widen(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The language model's inputs with the rows; where that cannot be, these are run apart, now."""
        places, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if places is None or not goes_on(self.host, self.main, kwargs):
            self.host.along = None
            self.apart()
            return kwargs
        embeds = kwargs["inputs_embeds"]
        text = (self.main.types[0] != VISUAL).nonzero()[self.shared :, 0].to(embeds.device)
        flat, _ = prompt_positions(self.host.model, self.host.family, self.inputs)
        own = flat.reshape(-1, flat.shape[-1])[0, self.shared :].to(places)
        wide = {
            **kwargs,
            "inputs_embeds": torch.cat([embeds, embeds[:, text]], dim=1),
            "position_ids": torch.cat([places, own.expand(*places.shape[:-1], -1)], dim=-1),
        }
        if mask is not None:
            wide["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), self.count)], dim=1)
        if (columns := kwargs.get("cache_position")) is not None:
            more = torch.arange(1, self.count + 1, device=columns.device)
            wide["cache_position"] = torch.cat([columns, columns[-1] + more])
        return wide

    def attention(
        self,
        function: Callable[..., tuple[torch.Tensor, None]],
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, H, q + count, D] -> [B, q + count, H, D]: the added rows see the columns before the image and their own."""
        host, n = self.host, self.main.length
        outer, recorder, host.along = host.session, host.recorder, None
        added = None
        try:
            if not self.done:
                times = len(query) // len(self.inputs["input_ids"])  # beams repeat each prompt
                keys, values = (
                    torch.cat([x[::times, :, : self.shared], x[::times, :, n:]], dim=2) for x in (key, value)
                )
                self.seen = self.seen.to(query.device)
                host.session, host.recorder = self.session, self.recorder
                try:
                    added = function(module, query[::times, :, n:], keys, values, self.seen, **kwargs)[0]
                    added = added if times == 1 else added.repeat_interleave(times, dim=0)
                except Done:
                    self.done = True
            host.session, host.recorder = outer, recorder
            mask = mask if mask is None else mask[:, :, :n, :n]
            own = function(module, query[:, :, :n], key[:, :, :n], value[:, :, :n], mask, **kwargs)[0]
            added = own.new_zeros(len(own), self.count, *own.shape[2:]) if added is None else added
            return torch.cat([own, added], dim=1)
        finally:
            host.session, host.recorder, host.along = outer, recorder, self

    def narrow(self, output: Any, cache: Any) -> None:
        """Take the rows out of the language model's output and the cache."""
        self.host.along = None
        output.last_hidden_state = output.last_hidden_state[:, : self.main.length]
        cache.crop(-self.count)


def along_with(
    host: Host, inputs: dict[str, torch.Tensor], recorder: Recorder, apart: Callable[[], None]
) -> Along | None:
    """The prompt without images as a part of the forward that now begins; None if it has to be run apart.

    All rows must be prompts of the same layout, unpadded, of which no method changes what stands before the first image.
    """
    main = host.main
    if main is None or main.call is not host.call or host.along is not None or host.recorder is not None or main.start:
        return None
    cache = main.cache() if main.cache is not None else None
    plain = [m for m in host.active if isinstance(m, AttentionEdit) and not isinstance(m, LayerInputReader)]
    plain = [m for m in plain if not (getattr(m, "prepares", False) or getattr(m, "contrasts", False))]
    if type(cache) is not DynamicCache or len(plain) < len(host.active) or main.padded:
        return None
    visual = main.types == VISUAL
    shared, count = int(visual[0].int().argmax()), int((~visual[0]).sum())
    same = bool((visual == visual[0]).all()) and bool(visual[0].any()) and count == inputs["input_ids"].shape[1]
    changed = min(main.rows_in(m.row_scope, m.needs_image).first for m in plain)
    if not same or not shared or count == shared or changed < shared:
        return None
    return Along(host, main, inputs, recorder, apart, count - shared)
