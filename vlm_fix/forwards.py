"""Forwards of a wrapped model: each finds the session of its KV cache, or opens one, and classifies its new columns."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from vlm_fix import checkpointing, compiled
from vlm_fix.attention import NAME
from vlm_fix.attention.along import along_with
from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.families import prompt_positions
from vlm_fix.families.compat import CACHE, cache_of, versions
from vlm_fix.recorder import Done, Recorder
from vlm_fix.session import PAD, TEXT, VISUAL, Session
from vlm_fix.wing import NO_IDS, NO_IMAGE, NOT_NUMBERS, OUTSIDE, Host


class Forwards(Host):
    """The hooks before and after the multimodal model's forward."""

    def one_graph(self, rows: int) -> bool:
        """True if a forward of this many query rows can run inside one compiled graph."""
        return all(wing.one_graph(rows) for wing in self.wings)

    def _enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Before the multimodal model's forward: find or open the session and classify the new columns."""
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None and compiled.tracing(self, ids.shape[1]):
            return compiled.enter(self, args, kwargs)
        return self._entered(module, args, kwargs)

    @compiled.uncompiled
    def _entered(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self.session is not None and self.session.plain:  # a pass that only observes
            return None
        checkpointing.keep(self)
        self._refuse_forward(module, kwargs)
        ids, cache = args[0] if args else kwargs.get("input_ids"), cache_of(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        self.session = self.joint = self.along = (
            None  # if anything below fails, the next forward must not see an old one
        )
        session = self.sessions.get(cache) if cache is not None else None
        text = self._answer_text(session, past, ids)
        if text is None:
            kinds = self.classify(self._prompt_ids(past, kwargs) if ids is None else ids, kwargs.get("inputs_embeds"))
        else:
            kinds = text
        if cache is None:
            self._check_cacheless(ids, kwargs)
        if session is None:
            session = self._open(self.call or self._bare_call(ids, kwargs), past, kinds)
            if cache is not None:
                self.sessions[cache] = session
        self._advance(session, past, kinds, kwargs.get("attention_mask"), text is not None)
        if self.call is None and not self.quiet:
            self._say_what_is_left_out(session, ids is None)
        changed = (wing.enter(session, args, kwargs) for wing in self.wings)
        return next((c for c in changed if c is not None), None)

    def enter_compiled(self, ids: torch.Tensor, mask: torch.Tensor | None, past: int) -> None:
        """`_enter` when a compiled graph runs: `generate` has one session, and it is the main one."""
        self.session = None
        assert self.call is not None
        session = self.main if past else None
        text = self._answer_text(session, past, ids)
        kinds = self.classify(ids) if text is None else text
        if past and session is None and self.call.cache is not None:  # the next turn on a kept cache
            session = self.sessions.get(self.call.cache)
        self._advance(session or self._open(self.call, past, kinds), past, kinds, mask, text is not None)

    def _answer_text(self, session: Session | None, past: int, ids: torch.Tensor | None) -> torch.Tensor | None:
        """[B, q] TEXT for ids after the prompt of the call that runs, which need no look; None for others."""
        if session is None or ids is None or session.fresh or session.call is not self.call:
            return None
        return torch.full_like(ids, TEXT, dtype=torch.uint8) if past >= session.prompt_len else None

    def _refuse_forward(self, module: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("output_attentions") or module.config.output_attentions:
            raise VlmFixError(
                "attention weights are never formed here: drop output_attentions=True, or unwrap the model first."
            )
        if "cu_seq_lens_q" in kwargs:
            raise VlmFixError(
                "packed sequences (cu_seq_lens) are not supported; pass a padded batch with its attention_mask."
            )
        now = module.config.get_text_config()._attn_implementation
        if now != NAME:
            raise VlmFixError(
                f"attention was set to {now!r} after wrap, past every method: unwrap the model, then wrap it."
            )

    def _check_cacheless(self, ids: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        """Refuse a decode step whose cache is not among its arguments: every method would silently do nothing."""
        mask = kwargs.get("attention_mask")
        again = self.call is not None and self.main is not None and self.main.call is self.call
        if again and kwargs.get("use_cache") is not False:
            what = "a later forward of generate came without a cache"
        elif ids is not None and isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] > ids.shape[1]:
            what = "a decode step came without a cache"
        else:
            return
        raise VlmFixError(
            f"{what}, so no method can act in it: {versions()} does not hand caches on in a way known here, or the model "
            f"was called without {CACHE}=. Run `vlm-fix doctor`, or unwrap the model."
        )

    def _prompt_ids(self, past: int, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """[B, q] the token ids of a prompt whose embeddings the caller gave to `generate` beside them."""
        embeds, ids = kwargs.get("inputs_embeds"), self.call.inputs["input_ids"] if self.call else None
        if embeds is None or ids is None or len(embeds) % len(ids) or past + embeds.shape[1] > ids.shape[1]:
            return None
        return ids[:, past : past + embeds.shape[1]].repeat_interleave(len(embeds) // len(ids), dim=0)

    def _open(self, call: Call, past: int, kinds: torch.Tensor) -> Session:
        """A new session of the main branch."""
        if past:
            raise VlmFixError("the cache was filled while the model was not wrapped; start from the whole prompt.")
        return Session(call, prompt_len=call.inputs["input_ids"].shape[1] if self.call else kinds.shape[1])

    def _advance(self, session: Session, past: int, kinds: torch.Tensor, mask: Any, text: bool = False) -> None:
        """The session of this forward with its new columns, of `kinds` [B, q] (text: all TEXT); a new prompt begins."""
        fresh = session.fresh
        if session.branch == "main" and self.call is not None and (fresh or session.call is not self.call):
            fresh, session.call = True, self.call  # a new prompt, or the next turn on a kept cache
            session.prompt_len = self.call.inputs["input_ids"].shape[1]
        elif session.branch == "main" and self.call is None and (fresh or kinds.shape[1] > 1):
            session.prompt_len = past + kinds.shape[1]
        answer = past >= session.prompt_len
        if answer and not text:  # an image token that the model generates shows no image
            kinds = torch.full_like(kinds, TEXT)
        kinds = self._without_padding(session, past, kinds, mask)
        session.advance(past, kinds, answer)
        self.effects.next_forward(answer)
        if self.call is not None and past + kinds.shape[1] < session.prompt_len:
            self._look_ahead(session)
        if session.branch == "main" and self.call is not None:
            self.main = session
        if fresh:
            self._begin(session)
        self.session = session

    def _look_ahead(self, session: Session) -> None:
        """In a chunk of a prompt, `last_visual` is that of the whole prompt: it says which rows come after the images."""
        ids, mask = session.call.inputs["input_ids"], session.call.inputs.get("attention_mask")
        shown = self.classify(ids) == VISUAL
        shown = shown & (mask != 0).to(ids.device) if mask is not None and mask.shape == ids.shape else shown
        last = torch.where(shown, torch.arange(ids.shape[1], device=ids.device), -1).amax(dim=1)
        last = last.repeat_interleave(len(session.types) // len(ids), dim=0)
        session.last_visual = [max(pair) for pair in zip(session.last_visual, last.tolist(), strict=True)]

    def _without_padding(self, session: Session, past: int, kinds: torch.Tensor, mask: Any) -> torch.Tensor:
        """`kinds` [B, q] with PAD where a prompt's mask says so; VlmFixError where a prompt ends in padding."""
        if past >= session.prompt_len:
            return kinds
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:  # a static cache's masks come ready-made
            mask = session.call.inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and mask.shape[1] >= past + kinds.shape[1]:
            mask = mask.repeat_interleave(len(kinds) // len(mask), dim=0)
            kinds = torch.where(mask[:, past : past + kinds.shape[1]].to(kinds.device) == 0, PAD, kinds)
        last = session.prompt_len - 1 - past
        if last < kinds.shape[1] and bool((kinds[:, last] == PAD).any()):
            raise VlmFixError(
                "a prompt is padded on the right, so that its last token is not where methods act; pad on the left: "
                'processor.tokenizer.padding_side = "left".'
            )
        return kinds

    def _bare_call(self, ids: torch.Tensor | None, kwargs: dict[str, Any]) -> Call:
        """The call of a forward outside `generate`."""
        given = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor)} | {"input_ids": ids}
        if ids is not None and given.get("attention_mask") is None:
            given["attention_mask"] = torch.ones_like(ids)
        return Call(self.model, self.family, given)

    def _begin(self, session: Session) -> None:
        """First forward of a prompt: let methods prepare (text-only passes and the like)."""
        if max(session.last_visual) >= 0:
            for wing in self.wings:
                wing.on_prompt(session)

    def _say_what_is_left_out(self, session: Session, no_ids: bool) -> None:
        """Warn, once, of what a caller's own forward goes without; no_ids: it came as embeddings alone."""
        blind = max(session.last_visual) < 0
        if blind and session.start < session.prompt_len:
            self.warn_once([m for m in self.active if m.needs_image], NO_IDS if no_ids else NO_IMAGE)
        for method, what in (left_out for wing in self.wings for left_out in wing.only_in_generate()):
            if not (blind and method.needs_image):
                self.warn_once([method], OUTSIDE, f"does not {what} in this forward")

    def _leave(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After the forward: remember a cache that the model made itself, for a caller's own decoding loop."""
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None or not compiled.tracing(self, ids.shape[1]):
            self._left(output)

    @compiled.uncompiled
    def _left(self, output: Any) -> None:
        if self.session is not None and self.session.plain:
            return
        if self.session is not None and self.call is None and not self.quiet:
            self._refuse_nan(output)
        cache = cache_of(output)
        if cache is not None and self.session is not None and cache not in self.sessions and not self.joint:
            self.sessions[cache] = self.session
        self.session = None

    def _refuse_nan(self, output: Any) -> None:
        """VlmFixError where a caller's own forward ends in NaN, on a CPU: elsewhere asking would wait for the device.

        `generate` asks at its end; a training loop has its own ways.
        """
        x = getattr(output, "last_hidden_state", None)
        x = getattr(output, "logits", None) if x is None else x
        if x is not None and x.device.type == "cpu" and not self.model.training and bool(x[:, -1].isnan().any()):
            raise VlmFixError(f"with {'+'.join(m.name for m in self.active)} {NOT_NUMBERS}")

    @torch.no_grad()
    def run_prompt(self, inputs: dict[str, torch.Tensor], recorder: Recorder, later: bool = False) -> None:
        """One forward of a prompt without edits and without a cache, for methods that must know something in advance.

        later: the recorder may be called after this returns, for each layer before the methods act in it on the prompt itself.
        A server then reads the prompts of many requests at once; here a prompt without images runs along with the prompt
        itself, where it can, and the recorder sees the rows from the first image's place on.
        """
        if later:
            self.along = along_with(self, inputs, recorder, lambda: self.run_prompt(inputs, recorder))
            if self.along is not None:
                return
        positions, _ = prompt_positions(self.model, self.family, inputs)
        call = Call(self.model, self.family, inputs)
        session = Session(call, prompt_len=inputs["input_ids"].shape[1], branch="observe", plain=True)
        session.advance(0, self.classify(inputs["input_ids"]))
        outer, self.session = self.session, session
        try:
            with self.recording(recorder), contextlib.suppress(Done):
                self.base(**inputs, position_ids=positions, use_cache=False)
        finally:
            self.session = outer
