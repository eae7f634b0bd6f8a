"""The second branches of a contrast method, as a logits processor that keeps their caches in step with the main sequences.

A processor is the one place that every decoding mode passes through. At each call a branch finds, for every row, the
row of its own cache with the longest equal prefix (a beam may have moved), rolls back what differs and runs the rest.
That makes it right under greedy, sampling, beam search, streaming and assisted decoding alike. Under greedy and sampling
the branches join the main forward instead (joint.py); a branch that did not, or guessed wrong, catches up as above.

What a branch has in common with the main prompt is not computed again: image features (unless its pixels differ), the
keys of the columns up to where the two prompts part, and the layers before `Contrast.fork` where they never part.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor

from vlm_fix.attention.edits import AttentionEdit
from vlm_fix.errors import VlmFixError
from vlm_fix.families import prompt_positions
from vlm_fix.families.compat import cache_of, with_cache
from vlm_fix.session import PAD, VISUAL, Call, Session, View, left_pack

from . import joint
from .kinds import Contrast, LogitEdit, Negative
from .term import Term


def plausible(scores: torch.Tensor, log_probs: torch.Tensor, beta: float) -> torch.Tensor:
    """Adaptive plausibility constraint (Li et al. 2023): -inf where p < beta max p. [B, V] each."""
    if beta <= 0:
        return scores
    cut = log_probs.amax(dim=-1, keepdim=True) + torch.log(torch.tensor(beta))
    return scores.masked_fill(log_probs < cut, -torch.inf)


def install(engine: Any) -> list[Any]:
    """Hooks that keep the main prompt's image embeddings for the branches, and that part joined branches again."""

    def embeddings(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        session = engine.session
        if session is None or session.plain or session.start >= session.prompt_len:
            return None
        x = kwargs["inputs_embeds"]
        if session.branch == "main":
            # deep-stacked features and masks made by the multimodal model are more than embeddings
            whole = not isinstance(kwargs.get("attention_mask"), dict) and not any(
                v is not None for k, v in kwargs.items() if "visual" in k
            )
            if engine.contrasting and whole:
                session.embeds = [*((session.embeds or []) if session.start else []), x.detach()]
            return None
        shown = (session.types[:, session.start :] == VISUAL).to(x.device)
        if not shown.any() or (session.features is None and session.change is None):
            return None
        features = x[shown] if session.features is None else session.features
        features = features if session.change is None else session.change(features)
        return args, {**kwargs, "inputs_embeds": x.masked_scatter(shown[..., None], features.to(x))}

    def part(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        return engine.joint.part(output) if engine.joint else output

    first, layers = engine.contrast.fork, engine.language.layers

    def fork(i: int, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        session = engine.session
        if session is None or session.plain or engine.joint:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        if i == first and session.branch == "main" and session.embeds:
            session.hidden = [*((session.hidden or []) if session.start else []), x.detach()]
        if i == first and session.taken:
            x = enter(engine, session, range(first, len(layers)), x)
        view = session.at(i)
        if not isinstance(view, View):
            return None
        tables = view._masks.get("rotary", kwargs["position_embeddings"])
        changed = {"attention_mask": view.attention_mask(x.device), "position_embeddings": tables, "position_ids": None}
        return (x, *args[1:]) if args else (), {**kwargs, **changed} | ({} if args else {"hidden_states": x})

    return [
        engine.language.register_forward_pre_hook(embeddings, with_kwargs=True),
        engine.model.register_forward_hook(part, with_kwargs=True),
        *(
            layer.register_forward_pre_hook(functools.partial(fork, i), with_kwargs=True)
            for i, layer in enumerate(layers)
            if first is not None and i >= first and not engine.shortens
        ),
    ]


def enter(engine: Any, session: Session, layers: range, x: torch.Tensor) -> torch.Tensor:
    """The prompt's last row x [B, 1, C] -> all rows [B, n, C] of it that the branch's later `layers` have."""
    assert session.taken and session.types is not None
    (hidden, positions), types, stays = session.taken, session.types, engine.contrast.stays(session)
    real = types != PAD
    index = torch.arange(types.shape[1], device=types.device).expand_as(types)
    if stays is not None:
        index, real = left_pack(real & stays.to(real.device))
    view, index = session.drop(layers, index, real), index.to(x.device)
    x = torch.cat([hidden.to(x), x], dim=1).gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
    places = positions.to(x.device).gather(-1, index.expand(*positions.shape[:-1], -1))
    view._masks["rotary"] = engine.language.rotary_emb(x, places)
    return x


class PrefixContrast(LogitsProcessor):
    """Replaces the scores [B, V] by `method.combine_at(step, main, *negatives)`, renormalised (beam search adds them up)."""

    def __init__(self, engine: Any, method: Contrast, call: Call, joins: bool = False, term: Term | None = None):
        self.engine, self.method, self.call, self.joins = engine, method, call, joins and joint.JOINS
        self.term = term
        self.branches: list[Branch] = []
        self.joint: joint.Joint | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not self.branches:
            wanted = self.method.branches(self.call)
            self.branches = [Branch(self.engine, self.call, name, branch) for name, branch in wanted.items()]
        generated = input_ids[:, self.call.inputs["input_ids"].shape[1] :]
        negatives = [b.logits(generated).to(scores.device).float().log_softmax(dim=-1) for b in self.branches]
        if self.engine.main:
            self.engine.main.embeds = self.engine.main.hidden = None  # every branch has its prompt now
        main = scores.float().log_softmax(dim=-1)
        combined = self.method.combine_at(generated.shape[1], main, *negatives)
        if self.term:
            self.term.add(main, combined, generated)
        return combined.log_softmax(dim=-1).to(scores.dtype)  # type: ignore[return-value]

    def join(self, session: Session, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """A decode step of the main branch, widened to all branches; None where it has to run alone."""
        if not (self.joins and self.branches and joint.joinable(self.engine, session, self.branches, args, kwargs)):
            return None
        if self.joint is None or self.joint.caches[0] is not cache_of(kwargs):
            self.joint = joint.Joint(self.engine, session, self.branches, cache_of(kwargs))
        return (), self.joint.widen(kwargs)

    def close(self) -> None:
        """Let go of the branches and their caches."""
        self.branches, self.joint = [], None


class Branch:
    """A sequence batch with its own cache, driven by the tokens that the main branch chose."""

    def __init__(self, engine: Any, main: Call, name: str, negative: Negative):
        self.engine, self.main, self.inputs, self.name = engine, main, negative.inputs, name
        self.change = negative.features
        self.call = Call(engine.model, engine.family, negative.inputs)
        self.cache = DynamicCache(config=engine.model.config.get_text_config())
        self.mask = negative.inputs["attention_mask"]
        self.tokens: torch.Tensor | None = None  # [B', t] generated tokens whose keys are in the cache
        self.pending: torch.Tensor | None = None  # [B', V] logits of a joined step
        self.first: torch.Tensor  # [B', V] logits of the prompt
        self.next_position: torch.Tensor | None = None  # [B'] position id of the first generated token

    @torch.no_grad()
    def logits(self, generated: torch.Tensor) -> torch.Tensor:
        """[B', t] generated tokens -> this branch's next-token logits [B', V]."""
        pending, self.pending = self.pending, None
        if pending is not None and torch.equal(self.tokens, generated):  # type: ignore[arg-type]
            return pending
        if self.tokens is None:
            out = self.prefill()
            times = generated.shape[0] // self.mask.shape[0]
            if times > 1:  # beams or several samples of one prompt: they share its keys
                self.cache.batch_repeat_interleave(times)
                self.engine.sessions[self.cache].repeat(times)
                self.mask = self.mask.repeat_interleave(times, dim=0)
                self.next_position = self.next_position.repeat_interleave(times, dim=0)  # type: ignore[union-attr]
                out = out.repeat_interleave(times, dim=0)
            self.group, self.first = times, out
            self.tokens = generated[:, :0]
        if not generated.shape[1]:  # asked again while proposals are drafted
            return self.first
        keep = self._synchronise(generated)
        new = generated[:, keep:]
        ones = torch.ones_like(generated)
        steps = torch.arange(keep, generated.shape[1], device=generated.device)
        positions = self.next_position[:, None] + steps  # type: ignore[index]
        self.engine.sessions[self.cache].answer = generated
        out = self._forward({"input_ids": new, "attention_mask": torch.cat([self.mask, ones], dim=1)}, positions)
        self.tokens = generated
        return out

    @torch.no_grad()
    def prefill(self) -> torch.Tensor:
        """Run the prompt; its next-token logits [B, V]."""
        positions, self.next_position = prompt_positions(self.engine.model, self.engine.family, self.inputs)
        session = Session(self.call, branch=self.name, prompt_len=self.inputs["input_ids"].shape[1], change=self.change)
        self.engine.sessions[self.cache] = session
        inputs, start = self.inputs, self._fork(session, positions) or self._adopt(session, positions)
        if not start:
            session.features = self._features()
        if start or session.features is not None:
            inputs = {"input_ids": inputs["input_ids"][:, start:], "attention_mask": inputs["attention_mask"]}
        out = self._forward(inputs, positions[..., start:])
        if session.taken and self.engine.contrast.stays(session) is None:  # the later layers have all columns
            session.views.clear()
        session.features = session.change = session.taken = None
        return out

    def _forward(self, inputs: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        if self.engine.family.mrope and positions.dim() == 2:
            positions = positions.expand(3, -1, -1)
        base, model = self.engine.base, self.engine.model
        main, deltas = self.engine.call, getattr(base, "rope_deltas", None)
        self.engine.call = self.call
        try:
            given = {**inputs, "position_ids": positions, "use_cache": True, "logits_to_keep": 1}
            out = model(**with_cache(given, self.cache))
        finally:
            self.engine.call = main
            if deltas is not None:
                base.rope_deltas = deltas
        return out.logits[:, -1]

    def _same_images(self) -> bool:
        return self.inputs.get("pixel_values") is self.main.inputs.get("pixel_values")

    def _features(self) -> torch.Tensor | None:
        """[N, C] image embeddings of the main prompt, where this branch shows the same images."""
        main = self.engine.main
        if main is None or not main.embeds or not self._same_images() or "pixel_values" not in self.inputs:
            return None
        embeds = torch.cat(main.embeds, dim=1)
        ids = self.main.inputs["input_ids"]
        shown = self.engine._classify(ids, None) == VISUAL
        if embeds.shape[1] != ids.shape[1]:  # the next turn on a kept cache: earlier images are not in it
            return None
        self.call.vision, self.call.views = self.main.vision, self.main.views
        return embeds[:: len(embeds) // len(ids)][shown.to(embeds.device)]

    def _fork(self, session: Session, positions: torch.Tensor) -> int:
        """Take over the layers before the contrast's `fork`, for all columns but the last; returns how many columns."""
        engine, main = self.engine, self.engine.main
        first = engine.contrast.fork if engine.contrast else None  # other methods make branches too
        cache = next((c for c, s in engine.sessions.items() if s is main), None) if main and main.hidden else None
        if first is None or self.inputs is not self.main.inputs or self.change is not None:
            return 0
        layers: Any = cache.layers if type(cache) is DynamicCache and not cache.offloading else None
        if not layers or any(layer.is_sliding for layer in layers):
            return 0
        if engine.preparing or not all(m is engine.contrast or self._keeps_layers(m, first) for m in engine.active):
            return 0
        ids, hidden = self.inputs["input_ids"], torch.cat(main.hidden, dim=1)
        times, n = len(hidden) // len(ids), ids.shape[1] - 1
        hidden = hidden[::times, :n]
        if hidden.shape[1] < n:
            return 0
        for i, layer in enumerate(layers[:first]):
            self.cache.update(layer.keys[::times, :, :n], layer.values[::times, :, :n], i)
        if engine.family.mrope and positions.dim() == 2:
            positions = positions.expand(3, -1, -1)
        session.taken = hidden, positions
        self.call.vision, self.call.views = self.main.vision, self.main.views
        session.advance(0, torch.where(self.inputs["attention_mask"] == 0, PAD, engine._classify(ids, None))[:, :n])
        return n

    def _keeps_layers(self, method: Any, first: int) -> bool:
        """True if the method leaves the layers before `first` as the unwrapped model makes them."""
        if isinstance(method, AttentionEdit):
            assert isinstance(method.layers, tuple)
            return min(method.layers) >= first and not method.edits("begin") and not method.edits("watch")
        return isinstance(method, LogitEdit)

    def _adopt(self, session: Session, positions: torch.Tensor) -> int:
        """Take over the keys of the main prompt's columns before the prompts part; returns how many."""
        engine, main = self.engine, self.engine.main
        cache = next((c for c, s in engine.sessions.items() if s is main), None) if main else None
        if cache is None or not all(map(self._keeps_prompt, engine.active)):
            return 0
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            return 0
        theirs, ids, mask = self.main.inputs, self.inputs["input_ids"], self.inputs["attention_mask"]
        n = min(ids.shape[1] - 1, theirs["input_ids"].shape[1])
        same = ((ids[:, :n] == theirs["input_ids"][:, :n]) | (mask[:, :n] == 0)).all(dim=0)
        same &= (mask[:, :n] == theirs["attention_mask"][:, :n]).all(dim=0)
        place, _ = prompt_positions(engine.model, engine.family, theirs)
        same &= ((place[..., :n] == positions[..., :n]) | (mask[:, :n] == 0)).flatten(0, -2).all(dim=0)
        kinds = engine._classify(ids, None)
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
            stays = method.rows == "last" and not method.edits("begin") and not method.edits("watch")
            return not here or (method is self.engine.contrast and stays)
        return isinstance(method, Contrast | LogitEdit)

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
            if any(getattr(layer, "is_sliding", False) for layer in self.cache.layers):
                raise VlmFixError(
                    f"{self.name} cannot roll back a sliding-window cache; use greedy, sampling or beam search."
                )
            self.cache.crop(n - old.shape[1])
        return n
