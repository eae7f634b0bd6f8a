"""Logits processor that runs a contrast method's extra branches and keeps their caches aligned with the main sequences.

A processor is the one place that every decoding mode passes through. At each call a branch finds, for every row, the
row of its own cache with the longest equal prefix (a beam may have moved), rolls back what differs and runs the rest.
That makes it right under greedy, sampling, beam search, streaming and assisted decoding alike. Under greedy and sampling
the branches join the main forward instead (joint.py); a branch that did not, or guessed wrong, catches up as above.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from transformers import LogitsProcessor

from vlm_fix.attention.edits import AttentionEdit
from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.families.compat import cache_of
from vlm_fix.method import Method
from vlm_fix.options import GenerateOptions
from vlm_fix.packing import left_pack
from vlm_fix.pruning import PruningWing
from vlm_fix.session import PAD, VISUAL, Session, View
from vlm_fix.tensors import one_stream
from vlm_fix.wing import Host, Wing

from . import joint
from .branch import Branch, MainPrompt, ReusedPrompt
from .kinds import Contrast, Negative, log_probs
from .term import Term


def plausible(scores: torch.Tensor, logits: torch.Tensor, beta: float) -> torch.Tensor:
    """Adaptive plausibility constraint (Li et al. 2023): -inf where softmax(logits) < beta times its maximum. [B, V] each."""
    if beta <= 0:
        return scores
    cut = logits.amax(dim=-1, keepdim=True) + torch.log(torch.tensor(beta))
    return scores.masked_fill(logits < cut, -torch.inf)


class PrefixContrast(LogitsProcessor):
    """Replaces the scores [B, V] by `method.contrasted(step, main, *negatives)`; adds: a beam search will add them up."""

    def __init__(self, host: Host, method: Contrast, call: Call, joins: bool, adds: bool, term: Term | None = None):
        self.host, self.method, self.call, self.joins = host, method, call, joins
        self.adds, self.term = adds, term
        self.branches: list[Branch] = []
        self.joint: joint.Joint | None = None
        self.gated = False  # steps at which the model is sure may do without the branches

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        generated = input_ids[:, self.call.inputs["input_ids"].shape[1] :]
        if self.host.main is None or not self.host.main.predicts(generated.shape[1]):
            return scores  # made up: drafting asks which of its proposals are forbidden
        if not self.branches:
            wanted = self.method.branches(self.call)
            if not all(
                isinstance(n, Negative) and {"input_ids", "attention_mask"} <= {*n.inputs} for n in wanted.values()
            ):
                raise VlmFixError(
                    f"{self.method.name}: negative must return model inputs with input_ids and attention_mask."
                )
            self.branches = [Branch(self.host, self.call, name, branch, self.method) for name, branch in wanted.items()]
        raw = self.method.on_logits and not self.adds
        combined = main = log_probs(scores.float(), raw)
        sure, blind = self.method.sure(main), self._blind(main)
        kept = blind if sure is None else sure if blind is None else sure | blind
        self.gated = sure is not None
        if sure is None or not all(b.may_wait for b in self.branches) or not bool(sure.all()):
            negatives = [b.logits(generated).to(scores.device).float() for b in self.branches]
            self.host.main.parts.pop(MainPrompt, None)  # every branch has its prompt now
            combined = self.method.contrasted(generated.shape[1], main, *(log_probs(x, raw) for x in negatives))
            combined = combined if kept is None else torch.where(kept, main, combined)
        if not self.method.gated:
            self.host.effects.note(self.method, combined, main)
        if self.term:
            self.term.add(main, combined, generated, sure, blind)
        new = log_probs(combined, unless=not self.adds).to(scores.dtype)
        if combined is main:
            return scores
        return new if kept is None else torch.where(kept, scores, new)  # type: ignore[return-value]

    def _blind(self, main: torch.Tensor) -> torch.Tensor | None:
        """[B, 1] True for rows without an image, if the method needs one; None: there is no such row."""
        session = self.host.main
        assert session is not None
        if not self.method.needs_image or min(session.last_visual, default=0) >= 0:
            return None
        return ~session.shown(main.device)

    def join(self, session: Session, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """A decode step of the main branch, widened to all branches; None where it has to run alone."""
        known = self.host, session, self.branches, args, kwargs, self.gated
        if not (self.joins and self.branches and joint.joinable(*known)):
            return None
        if self.joint is None or self.joint.caches[0] is not cache_of(kwargs):
            self.joint = joint.Joint(self.host, session, self.branches, cache_of(kwargs))
        return (), self.joint.widen(kwargs)

    def close(self) -> None:
        """Let go of the branches and their caches."""
        if self.joint:
            self.joint.leave()
        self.branches, self.joint = [], None


class ContrastWing(Wing):
    """Hooks that keep the main prompt's embeddings for the branches, and that part joined branches again."""

    order = 40
    runs = (Contrast,)

    def __init__(self, host: Host, contrasts: list[Contrast]):
        super().__init__(host)
        self.contrasts, self.contrast = contrasts, contrasts[0]
        self.running: PrefixContrast | None = None  # of the running call, the innermost one
        self.term: Term | None = None  # of the last call

    @classmethod
    def claim(cls, host: Host) -> Self | None:
        found = [m for m in host.active if isinstance(m, Contrast) and m.contrasts]
        return cls(host, found) if found else None

    def check(self) -> None:
        if len(self.contrasts) > 1:
            names = " and ".join(m.name for m in self.contrasts)
            raise VlmFixError(f"{names} both contrast; use one of them at a time.")

    def install(self) -> Iterable[Any]:
        host, first = self.host, self.contrast.fork
        yield host.language.register_forward_pre_hook(self._embeddings, with_kwargs=True)
        yield host.model.register_forward_hook(self._part, with_kwargs=True)
        if first is not None and not host.wing(PruningWing):
            for i, layer in enumerate(host.language.layers):
                if i >= first:
                    yield layer.register_forward_pre_hook(functools.partial(self._fork, i), with_kwargs=True)

    @contextlib.contextmanager
    def around_generate(self, call: Call, options: GenerateOptions) -> Iterator[None]:
        term = None if options.assisted else Term(options.setting("eos_token_id"))  # drafts have made-up scores
        joins = options.beams == 1 and options.kwargs.get("custom_generate") is None and not options.assisted
        running = PrefixContrast(self.host, self.contrast, call, joins, options.beams > 1, term)
        call.processors.append(running)
        outer, self.running = self.running, running  # the caller's code inside a call may call generate
        try:
            yield
            for branch in running.branches:
                branch.check()
        finally:
            running.close()
            self.running, self.term = outer, term

    def only_in_generate(self) -> Iterator[tuple[Method, str]]:
        yield self.contrast, "contrast"

    def unused(self, session: Session) -> Iterator[tuple[Method, str]]:
        term = self.running.term if self.running else None
        kept, rows = (term.gated if term else None) or (0, 1)
        # what its branch shows is for nothing
        elsewhere = isinstance(self.contrast, AttentionEdit) and self.contrast.acts_in("main")
        if kept == rows and (not elsewhere or self.contrast in self.host.effects.idle()):
            yield self.contrast, f"at every token the model was as sure as gate={self.contrast.gate:g} asks; raise it."

    def enter(self, session: Session, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        running = self.running  # of the thread that generates: `main` is another thread's own
        return running.join(session, args, kwargs) if running and session is self.host.main else None

    def _embeddings(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        session = self.host.editing
        if session is None or session.start >= session.prompt_len or self.host.family.crosses:
            return None
        x = kwargs["inputs_embeds"]
        if session.branch == "main":
            # deep-stacked features and masks made by the multimodal model are more than embeddings
            whole = not isinstance(kwargs.get("attention_mask"), dict) and not any(
                v is not None for k, v in kwargs.items() if "visual" in k or "token_type" in k
            )
            running = self.running
            if running and session.call is running.call and whole:
                known = session.part(MainPrompt)
                known.embeds = [*(known.embeds if session.start else []), x.detach()]
            return None
        reused, shown = session.part(ReusedPrompt), (session.types[:, session.start :] == VISUAL).to(x.device)
        if not shown.any() or (reused.features is None and reused.change is None):
            return None
        features = x[shown] if reused.features is None else reused.features
        features = features if reused.change is None else reused.change(features)
        return args, {**kwargs, "inputs_embeds": x.masked_scatter(shown[..., None], features.to(x))}

    def _part(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        joined = self.host.joint
        return joined.split(output) if isinstance(joined, joint.Joint) else output

    def _fork(self, i: int, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        session, first, depth = self.host.editing, self.contrast.fork, self.host.arch.depth
        if session is None or self.host.joint or first is None:
            return None
        x = one_stream(args[0] if args else kwargs["hidden_states"], self.contrast.name)
        if i == first and session.branch == "main" and session.part(MainPrompt).embeds:
            known = session.part(MainPrompt)
            known.hidden = [*(known.hidden if session.start else []), x.detach()]
        if i == first and session.branch != "main" and session.part(ReusedPrompt).hidden:
            x = self._reuse(session, range(first, depth), x)
        view = session.at(i)
        if not isinstance(view, View):
            return None
        tables, places = view.forward.rotary or (kwargs["position_embeddings"], kwargs.get("position_ids"))
        mask = view.attention_mask(x.device)
        changed = {"attention_mask": mask, "position_embeddings": tables, "position_ids": places}
        return (x, *args[1:]) if args else (), {**kwargs, **changed} | ({} if args else {"hidden_states": x})

    def _reuse(self, session: Session, layers: range, x: torch.Tensor) -> torch.Tensor:
        """The prompt's last row x [B, 1, C] -> all rows [B, n, C] of it that the branch's later `layers` have."""
        reused, types = session.part(ReusedPrompt), session.types
        assert reused.hidden is not None
        (hidden, positions), stays = reused.hidden, self.contrast.stays(session)
        real = types != PAD
        index = torch.arange(types.shape[1], device=types.device).expand_as(types)
        if stays is not None:
            index, real = left_pack(real & stays.to(real.device))
        view, index = session.drop(layers, index, real), index.to(x.device)
        x = torch.cat([hidden.to(x), x], dim=1).gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        places = positions.to(x.device).gather(-1, index.expand(*positions.shape[:-1], -1))
        view.forward.rotary = self.host.language.rotary_emb(x, places), places if places.dim() == 2 else None
        return x
