"""The next-token distribution of served requests: second branches of a contrast, and edits of the one branch there is.

It acts on what `compute_logits` of vLLM's model returns, before vLLM's sampler and the caller's own processors, as in generate:
log-probabilities that a client asks for are those the method left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlm_fix.call import Call
from vlm_fix.decoding.kinds import log_probs
from vlm_fix.decoding.step import Step as Seen
from vlm_fix.decoding.step import fingerprints
from vlm_fix.families import final_norm
from vlm_fix.session import TEXT, VISUAL

from .beside import BesideForward, Line
from .engine import ServedEngine
from .groups import Group
from .layers import language_of
from .sessions import RequestSession, session_of

if TYPE_CHECKING:
    from .worker import Request, Served, Step


@dataclass
class BranchLine(Line):
    """The second branch of one request."""

    session: RequestSession | None = None
    ids: Sequence[int] = ()  # its prompt
    features: Any = None  # of its images
    taken: int = 0  # generated tokens that are in its cache


EXITS = 16  # rows whose logits of earlier layers are made at once; each takes a float for each layer and word


class Exits:
    """The logits of earlier layers in the rows `places` of a step's tokens; the head is read once for some of them."""

    def __init__(
        self, head: Callable[[torch.Tensor, bool], torch.Tensor], inputs: dict[int, torch.Tensor], places: list[int]
    ):
        self.head, self.inputs, self.places = head, inputs, places
        self.first, self.made = 0, dict[tuple[int, bool], torch.Tensor]()

    def of(self, i: int, layer: int, norm: bool) -> torch.Tensor:
        """[1, V] of row places[i], float32."""
        first = i - i % EXITS
        if first != self.first:
            self.first, self.made = first, {}
        if (layer, norm) not in self.made:
            rows = self.inputs[layer][self.places[first : first + EXITS]]
            self.made[layer, norm] = self.head(rows, norm).float()
        return self.made[layer, norm][i - first][None]


@dataclass(frozen=True)
class ServedSeen(Seen):
    """What an edit sees of row `row` of those whose exits are made together."""

    exits: Exits
    row: int

    def exit(self, layer: int, norm: bool) -> torch.Tensor:
        return self.exits.of(self.row, layer, norm)


class NextTokens:
    """Applied to the logits of each step on one worker."""

    def __init__(self, served: Served):
        self.served = served
        self.inputs: dict[int, torch.Tensor] = {}  # layer -> its input [tokens, C] in this step

    @torch.inference_mode()
    def edited(self, step: Step, logits: torch.Tensor) -> torch.Tensor:
        """[requests, V] -> the same, edited in the rows that predict a new token; float32 where anything was edited."""
        seen, self.inputs = self.inputs, {}
        rows = [s for s in step.samples if s[2].engine.contrast is not None or s[2].engine.logit_edits]
        if not rows:
            return logits
        out, negatives = logits.float(), self._negatives([s for s in rows if _contrasts(s[2])])
        out = out.clone() if out is logits else out
        exits = Exits(self.head, seen, [step.last[row] for row, *_ in rows])
        for i, (row, name, one) in enumerate(rows):
            generated = torch.tensor([self.served.runner.requests[name].output_token_ids], device=out.device).long()
            l, contrast = out[row : row + 1], one.engine.contrast
            if name in negatives:
                assert contrast is not None
                main, *others = (log_probs(x, contrast.on_logits) for x in (l, *negatives[name]))
                sure = contrast.sure(main)
                if sure is None or not bool(sure):  # else the model's own logits, as penalties see them
                    l = contrast.contrasted(generated.shape[1], main, *others)
            at = {layer: (x[step.last[row]][None, None], generated.shape[1]) for layer, x in seen.items()}
            prompts = functools.partial(self._prompts, name, one)
            host: Any = one.engine
            view = ServedSeen(host, one.session, prompts, generated, at, self.head, exits, i)  # type: ignore[arg-type]
            with one.engine.acting(one.session):
                for edit in one.engine.logit_edits:
                    l = edit.edit(log_probs(l, edit.on_logits), view)
            out[row] = l[0]
        return out

    def head(self, x: torch.Tensor, norm: bool) -> torch.Tensor:
        """[B, C] -> [B, V]: vLLM's head, after its last norm if asked."""
        x = x.to(self.served.runner.model_config.dtype)
        groups, self.served.groups = self.served.groups, []  # the norm is hooked where a method edits its output
        try:
            return self.served.plain_logits(final_norm(language_of(self.served.runner))(x) if norm else x)
        finally:
            self.served.groups = groups

    def _prompts(self, name: str, one: Request) -> list[int]:
        self._with_images(name, one)
        return fingerprints(one.session.call)

    def _with_images(self, name: str, one: Request) -> Call:
        """The request's call, with its images as the processor made them."""
        call = one.session.call
        if "pixel_values" not in call.inputs and one.session.last_visual[0] >= 0:
            call.inputs |= self.served.images.inputs(name)
        return call

    # ---- second branches ---------------------------------------------------------------------------------------------

    def _negatives(self, rows: Sequence[tuple[int, str, Request]]) -> dict[str, list[torch.Tensor]]:
        """By request, the logits [1, V] of its second branches after the tokens there are; one forward for all."""
        if not rows:
            return {}
        due: list[tuple[str, BranchLine, list[int], ServedEngine]] = []
        for _, name, one in rows:
            tokens = self.served.runner.requests[name].output_token_ids
            if not one.branches:
                one.branches = self._branches(name, one)
            for line in one.branches.values():
                new = tokens[line.taken :] if line.length else [*line.ids, *tokens]
                line.taken = len(tokens)
                due.append((name, line, list(new), one.engine))
        forward = BesideForward(self.served, [])
        ids: list[int] = []
        embeds: list[torch.Tensor] = []
        for name, line, new, engine in due:
            session = line.session
            assert session is not None
            if session.fresh and session.last_visual[0] >= 0:
                session.go_to(0, session.prompt_len)
                with engine.acting(session):
                    for wing in engine.wings:
                        wing.on_prompt(session)
            session.answer = torch.tensor([self.served.runner.requests[name].output_token_ids]).long()
            session.go_to(line.length, len(new))
            edited = not (engine.needs_image and session.last_visual[0] < 0)
            places = list(range(len(ids), len(ids) + len(new)))
            forward.groups.append(Group(engine, session, places, [], line.length + len(new)) if edited else None)
            forward.lines.append((line, len(new)))
            embeds.append(self._embeds(line, new))
            ids += new
        self.served.beside.read_asked()
        hidden = self.served.beside.run(forward, ids, torch.cat(embeds))
        ends = torch.tensor([count for _, count in forward.lines]).cumsum(0) - 1
        logits = self.served.plain_logits(hidden[ends.to(hidden.device)]).float()
        made: dict[str, list[torch.Tensor]] = {}
        for (name, *_), own in zip(due, logits, strict=True):
            made.setdefault(name, []).append(own[None])
        return made

    def _branches(self, name: str, one: Request) -> dict[str, BranchLine]:
        contrast, call = one.engine.contrast, self._with_images(name, one)
        assert contrast is not None
        made = {}
        with one.engine.acting(one.session):
            wanted = contrast.branches(call)
        for branch, negative in wanted.items():
            real = negative.inputs["attention_mask"][0].bool()
            ids = negative.inputs["input_ids"][0][real]
            visual = torch.isin(ids, one.engine.tokens)
            types = torch.where(visual, VISUAL, TEXT).to(torch.uint8)[None]
            inner = Call(call.model, call.family, {**negative.inputs, "input_ids": ids[None]})
            line = BranchLine(session=session_of(inner, types, branch), ids=ids.tolist())
            if bool(visual.any()):
                same = negative.inputs.get("pixel_values") is call.inputs.get("pixel_values")
                line.features = self.served.images.features(name, None if same else negative.inputs)
            made[branch] = line
        return made

    def _embeds(self, line: BranchLine, new: list[int]) -> torch.Tensor:
        runner = self.served.runner
        ids = torch.tensor(new, device=runner.device)
        if line.length or line.features is None:
            return runner.model.embed_input_ids(ids)
        assert line.session is not None
        shown = torch.zeros(len(new), dtype=torch.bool)
        shown[: line.session.prompt_len] = line.session.prompt[0] == VISUAL
        features, line.features = line.features, None
        return runner.model.embed_input_ids(ids, multimodal_embeddings=features, is_multimodal=shown.to(runner.device))


def _contrasts(one: Request) -> bool:
    contrast = one.engine.contrast
    return contrast is not None and (one.session.last_visual[0] >= 0 or not contrast.needs_image)
