"""A second branch of a contrast: a batch of sequences with its own cache, driven by the tokens that the main branch chose.

What a branch has in common with the main prompt is not computed again: image features (unless its pixels differ), the
keys of the columns up to where the two prompts part, and the layers before `Contrast.fork` where they never part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from vlm_fix.attention.edits import AttentionEdit, LayerInputReader, PromptStart
from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.families import prompt_positions
from vlm_fix.families.compat import carried, with_cache
from vlm_fix.hidden.edit import HiddenEdit
from vlm_fix.inputs import InputWing
from vlm_fix.packing import by_token
from vlm_fix.scope import RowScope
from vlm_fix.session import PAD, VISUAL, Session
from vlm_fix.wing import Host

from .kinds import Contrast, LogitEdit, Negative


@dataclass
class MainPrompt:
    """A part of the main session: what branches may reuse of its prompt, chunk by chunk."""

    embeds: list[torch.Tensor] = field(default_factory=list)  # embeddings [B', q, C]
    hidden: list[torch.Tensor] = field(default_factory=list)  # inputs [B', q, C] of the layer `Contrast.fork`


@dataclass
class ReusedPrompt:
    """A part of a branch's session while it runs its prompt: what it takes over, and what it changes."""

    hidden: tuple[torch.Tensor, torch.Tensor] | None = None  # of the main prompt [B, L, C], and the position ids
    features: torch.Tensor | None = None  # image embeddings [N, C] instead of a run of the vision tower
    change: Callable[[torch.Tensor], torch.Tensor] | None = None  # `Negative.features`


class Branch:
    """A sequence batch with its own cache, driven by the tokens that the main branch chose."""

    def __init__(self, host: Host, main: Call, name: str, negative: Negative, contrast: Contrast | None = None):
        self.host, self.main, self.inputs = host, main, negative.inputs
        self.name = name if contrast else f"main {name}"  # a look at the model, see `scope.of_main`
        self.contrast, self.change = contrast, negative.features
        self.call = Call(host.model, host.family, negative.inputs)
        self.cache = DynamicCache(config=host.model.config.get_text_config())
        self.mask = negative.inputs["attention_mask"]
        self.tokens: torch.Tensor | None = None  # [B', t] generated tokens whose keys are in the cache
        self.group = 1  # rows of `tokens` for each prompt, beams or samples
        self.pending: torch.Tensor | None = None  # [B', V] logits of a joined step
        self.strayed: torch.Tensor | None = None  # see `_follows`
        self.next_position: torch.Tensor | None = None  # [B'] position id of the first generated token

    @property
    def may_wait(self) -> bool:
        """True if a step whose logits nobody needs can be left to the next one: it has not run yet, and caches keep columns."""
        return self.tokens is not None and self.pending is None and self.host.keeps_columns(self.cache)

    @torch.no_grad()
    def logits(self, generated: torch.Tensor) -> torch.Tensor:
        """[B', t] generated tokens -> this branch's next-token logits [B', V]."""
        pending, self.pending = self.pending, None
        if pending is not None and self._follows(generated):
            return pending
        if self.tokens is None:
            out = self.prefill()
            times = generated.shape[0] // self.mask.shape[0]
            assert self.next_position is not None
            if times > 1:  # beams or several samples of one prompt: they share its keys
                rows = torch.arange(len(out), device=out.device).repeat_interleave(times)
                self.cache.reorder_cache(rows)  # type: ignore[arg-type]
                self.host.sessions[self.cache].repeat(times)
                self.mask = self.mask.repeat_interleave(times, dim=0)
                self.next_position = self.next_position.repeat_interleave(times, dim=0)
                out = out.repeat_interleave(times, dim=0)
            self.group, self.tokens = times, generated[:, :0]
            if not generated.shape[1]:
                return out
        keep = self._synchronise(generated)
        new = generated[:, keep:]
        ones = torch.ones_like(generated)
        steps = torch.arange(keep, generated.shape[1], device=generated.device)
        assert self.next_position is not None
        positions = self.next_position[:, None] + steps
        self.host.sessions[self.cache].answer = generated
        inputs = {"input_ids": new, "attention_mask": torch.cat([self.mask, ones], dim=1)}
        out = self._forward(inputs | carried(self.inputs, new), positions)
        self.tokens = generated
        return out

    def _follows(self, generated: torch.Tensor) -> bool:
        """True if the joined step was of these tokens [B', t], as it always is where tokens are chosen one by one.

        On an accelerator nobody waits for that: `check` asks at the end.
        """
        if self.tokens is None or self.tokens.shape != generated.shape:
            return False
        if generated.device.type == "cpu":
            return torch.equal(self.tokens, generated)
        strayed = (self.tokens != generated).any()
        self.strayed = strayed if self.strayed is None else self.strayed | strayed
        return True

    def check(self) -> None:
        """VlmFixError if a joined step was of other tokens than `generate` went on with. This waits for the device."""
        if self.strayed is not None and bool(self.strayed):
            raise VlmFixError(
                f"{self.name}: generate went on with other tokens than the model was given, which a second branch cannot "
                "follow; drop what changes tokens after they are chosen."
            )

    @torch.no_grad()
    def prefill(self) -> torch.Tensor:
        """Run the prompt; its next-token logits [B, V]."""
        positions, self.next_position = prompt_positions(self.host.model, self.host.family, self.inputs)
        session = Session(self.call, prompt_len=self.inputs["input_ids"].shape[1], branch=self.name)
        reused = session.part(ReusedPrompt)
        reused.change = self.change
        self.host.sessions[self.cache] = session
        inputs, start = self.inputs, self._fork(session, positions) or self._adopt(session, positions)
        if not start:
            reused.features = self._features()
        if "inputs_embeds" in inputs and not start and reused.features is None:
            raise VlmFixError(f"{self.name} cannot take inputs_embeds here; pass pixel_values in their place.")
        if start or reused.features is not None:
            cut = {name: inputs[name][:, start:] for name in by_token(inputs)}
            inputs = {**cut, "attention_mask": inputs["attention_mask"]}
        out = self._forward(inputs, positions[..., start:])
        if reused.hidden is not None and self.contrast and self.contrast.stays(session) is None:
            session.views.clear()  # the later layers have all columns
        del session.parts[ReusedPrompt]
        return out

    def _forward(self, inputs: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        if self.host.family.mrope and positions.dim() == 2:
            positions = positions.expand(3, -1, -1)
        base, model = self.host.base, self.host.model
        main, deltas = self.host.call, getattr(base, "rope_deltas", None)
        self.host.call = self.call
        try:
            given = {**inputs, "position_ids": positions, "use_cache": True, "logits_to_keep": 1}
            out = model(**with_cache(given, self.cache))
        finally:
            self.host.call = main
            if deltas is not None:
                base.rope_deltas = deltas
        return out.logits[:, -1]

    def _same_images(self) -> bool:
        return self.inputs.get("pixel_values") is self.main.inputs.get("pixel_values")

    def _features(self) -> torch.Tensor | None:
        """[N, C] image embeddings of the main prompt, where this branch shows the same images."""
        main = self.host.main
        if (
            main is None
            or self.host.family.crosses
            or not main.part(MainPrompt).embeds
            or not self._same_images()
            or not {"pixel_values", "inputs_embeds"} & self.inputs.keys()
        ):
            return None
        embeds = torch.cat(main.part(MainPrompt).embeds, dim=1)
        ids = self.main.inputs["input_ids"]
        shown = self.host.classify(ids) == VISUAL
        if embeds.shape[1] != ids.shape[1]:  # the next turn on a kept cache: earlier images are not in it
            return None
        self.call.vision, self.call.views = self.main.vision, self.main.views
        return embeds[:: len(embeds) // len(ids)][shown.to(embeds.device)]

    def _fork(self, session: Session, positions: torch.Tensor) -> int:
        """Take over the layers before the contrast's `fork`, for all columns but the last; returns how many columns."""
        host, main = self.host, self.host.main
        first = self.contrast.fork if self.contrast else None  # other methods make branches too
        known = main.part(MainPrompt).hidden if main else []
        cache = main.cache() if known and main.cache else None
        if first is None or self.inputs is not self.main.inputs or self.change is not None:
            return 0
        layers: Any = cache.layers if type(cache) is DynamicCache and not cache.offloading else None
        if not layers or not host.keeps_columns(cache):
            return 0
        if host.wing(InputWing) or not all(m is self.contrast or self._keeps_layers(m, first) for m in host.active):
            return 0
        ids, hidden = self.inputs["input_ids"], torch.cat(known, dim=1)
        times, n = len(hidden) // len(ids), ids.shape[1] - 1
        hidden = hidden[::times, :n]
        if hidden.shape[1] < n:
            return 0
        for i, layer in enumerate(layers[:first]):
            self.cache.update(layer.keys[::times, :, :n], layer.values[::times, :, :n], i)
        if host.family.mrope and positions.dim() == 2:
            positions = positions.expand(3, -1, -1)
        session.part(ReusedPrompt).hidden = hidden, positions
        self.call.vision, self.call.views = self.main.vision, self.main.views
        session.advance(0, torch.where(self.inputs["attention_mask"] == 0, PAD, host.classify(ids))[:, :n])
        return n

    def _keeps_layers(self, method: Any, first: int) -> bool:
        """True if the method leaves the layers before `first` as the unwrapped model makes them."""
        if isinstance(method, AttentionEdit):
            assert isinstance(method.layers, tuple)
            return min(method.layers) >= first and not isinstance(method, PromptStart | LayerInputReader)
        return isinstance(method, LogitEdit) and not isinstance(method, HiddenEdit)

    def _adopt(self, session: Session, positions: torch.Tensor) -> int:
        """Take over the keys of the main prompt's columns before the prompts part; returns how many."""
        host, main = self.host, self.host.main
        cache = main.cache() if main and main.cache else None
        if cache is None or not all(map(self._keeps_prompt, host.active)):
            return 0
        if not host.keeps_columns(cache):
            return 0
        theirs, ids, mask = self.main.inputs, self.inputs["input_ids"], self.inputs["attention_mask"]
        n = min(ids.shape[1] - 1, theirs["input_ids"].shape[1])
        same = ((ids[:, :n] == theirs["input_ids"][:, :n]) | (mask[:, :n] == 0)).all(dim=0)
        same &= (mask[:, :n] == theirs["attention_mask"][:, :n]).all(dim=0)
        place, _ = prompt_positions(host.model, host.family, theirs)
        same &= ((place[..., :n] == positions[..., :n]) | (mask[:, :n] == 0)).flatten(0, -2).all(dim=0)
        kinds = host.classify(ids)
        if not self._same_images() or self.change is not None:
            same &= ~(kinds[:, :n] == VISUAL).any(dim=0)
        n = int(same.long().cumprod(dim=0).sum())
        if (kinds[:, n:] == VISUAL).any():
            return 0
        times = cache.layers[0].keys.shape[0] // len(ids)
        for i, layer in enumerate(cache.layers if n else ()):
            self.cache.update(layer.keys[::times, :, :n], layer.values[::times, :, :n], i)
        if n:
            session.advance(0, torch.where(mask == 0, PAD, kinds)[:, :n])
        return n

    def _keeps_prompt(self, method: Any) -> bool:
        """True if the method leaves the prompt's columns before the last as the unwrapped model makes them."""
        if isinstance(method, AttentionEdit):
            here = [b for b in ("main", self.name) if method.acts_in(b)]
            stays = method.row_scope is RowScope.LAST and not isinstance(method, PromptStart | LayerInputReader)
            return not here or (method is self.contrast and stays)
        if getattr(method, "own_keys", False):
            return False
        return isinstance(method, Contrast | LogitEdit) and not isinstance(method, HiddenEdit)

    def _synchronise(self, generated: torch.Tensor) -> int:
        """Reorder and roll back the cache to the longest prefix common with `generated`; its length is returned."""
        assert self.tokens is not None
        old, n = self.tokens, min(self.tokens.shape[1], generated.shape[1] - 1)
        if n and not torch.equal(old[:, :n], generated[:, :n]):
            same = (generated[:, None, :n] == old[None, :, :n]).long().cumprod(-1).sum(-1)  # [B', B'] common prefix
            groups = torch.arange(len(old), device=old.device) // self.group
            same = torch.where(groups[:, None] == groups[None], same, -1) * 2 + torch.eye(
                len(old), device=old.device, dtype=same.dtype
            )
            best, parent = same.max(dim=1)
            self.cache.reorder_cache(parent)  # type: ignore[arg-type]
            n = int(best.min()) // 2
        if old.shape[1] > n:
            if not self.host.keeps_columns(self.cache):
                raise VlmFixError(
                    f"{self.name} cannot roll back the cache of sliding windows, linear or cross-attention; use greedy, sampling "
                    "or beam search."
                )
            self.cache.crop(n - old.shape[1])
        return n
