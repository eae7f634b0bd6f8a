"""The engine of a stack that is served: it plans for a model without weights and acts in vLLM's worker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlm_fix import calibrated, presets
from vlm_fix.attention import AttentionWing
from vlm_fix.attention.edits import LayerInputReader, PromptStart
from vlm_fix.decoding.contrast import ContrastWing
from vlm_fix.decoding.kinds import Contrast, LogitEdit
from vlm_fix.engine import Engine
from vlm_fix.families import arch_of
from vlm_fix.hidden import HiddenWing
from vlm_fix.hidden.edit import HiddenEdit, VisionMLPEdit
from vlm_fix.inputs import InputEdit
from vlm_fix.method import Method
from vlm_fix.pruning.kinds import TokenPruner
from vlm_fix.recorder import Recorder
from vlm_fix.scope import RowScope
from vlm_fix.session import Session
from vlm_fix.wing import ATTRIBUTE

from .settings import Settings

if TYPE_CHECKING:
    from .worker import Served


class ServedEngine(Engine):
    """What wings and methods see as their host; nothing is installed on the model without weights."""

    served: Served | None = None  # the worker it acts in

    def __init__(self, model: Any, methods: Sequence[Method]):
        super().__init__(model, list(methods))
        self.effects.asked = False  # a request is told of by what its session remembers
        self.attention = self.need(AttentionWing)
        self.hidden, self.contrasting = self.wing(HiddenWing), self.wing(ContrastWing)
        self.contrast: Contrast | None = self.contrasting.contrast if self.contrasting else None
        self.logit_edits = [m for m in self.active if isinstance(m, LogitEdit) and m.edits_logits]
        self.input_edits = [m for m in self.active if isinstance(m, InputEdit) and m.prepares]
        self.pruner = next((m for m in self.active if isinstance(m, TokenPruner)), None)
        self.vision = [m for m in self.active if isinstance(m, VisionMLPEdit) and m.vision_layers]
        self.one_by_one = any(isinstance(m, HiddenEdit) and m.keeps_history for m in self.active)
        self.only_last_rows = not (
            self.changes_prompt or self.one_by_one
        )  # nothing of a prompt but its last row is looked at
        tracking = any(getattr(m, "tracks_columns", False) for m in self.active)
        self.of_one_length = (
            tracking or not self.only_last_rows
        )  # prompts are a batch only where their columns are the same
        self.needs_whole = any(m.whole_prompt for m in self.active)
        self.needs_image = bool(self.active) and all(m.needs_image for m in self.active)

    @property
    def edits(self) -> list[Any]:
        """Of attention and of hidden states."""
        return [*self.attention.edits, *(self.hidden.edits if self.hidden else ())]

    def need(self, kind: Any) -> Any:
        """The wing of this class, which is always there."""
        wing = self.wing(kind)
        assert wing is not None
        return wing

    @classmethod
    def plan(cls, model: Any, settings: Settings) -> ServedEngine:
        """For a model without weights; raises VlmFixError as `wrap` would."""
        presets.check(settings.methods, model)
        methods = settings.parsed()
        found = calibrated.choose(list(settings.calibration), model, methods)
        return cls(model, calibrated.apply(found, methods, arch_of(model)))

    @property
    def changes_prompt(self) -> bool:
        """True if a prompt's rows before its last are changed or must be seen: its keys then cannot come from a cache."""
        scoped = [m for m in self.active if hasattr(m, "row_scope")]
        return any(m.row_scope is not RowScope.LAST or isinstance(m, LayerInputReader) for m in scoped)

    @property
    def reads_pixels(self) -> bool:
        """True if a request's images may be needed once more, also where its prompt comes from the prefix cache."""
        return self.contrast is not None or bool(self.input_edits) or any(map(_reads_prompt, self.active))

    @property
    def needs(self) -> dict[str, bool]:
        """What a server must have been started for."""
        return {
            "hooks on layers": any(isinstance(m, LayerInputReader) for m in self.active)
            or self.hidden is not None
            or any(e.exits for e in self.logit_edits),
            "a pass beside the batch": self.contrast is not None
            or any(isinstance(m, PromptStart) or _reads_prompt(m) for m in self.active),
            "the tokens of a step before the next begins": bool(self.contrast or self.logit_edits),
            "prompts without a prefix cache": self.changes_prompt,
            "prompts in one piece": self.needs_whole,
            "the vision tower": bool(self.input_edits or self.vision) or self.pruner is not None,
        }

    @contextlib.contextmanager
    def acting(self, session: Session) -> Iterator[None]:
        """`session` is the one that this engine's methods see, and `engine_of` finds this engine, until this ends."""
        before, outer = self.session, vars(self.model).get(ATTRIBUTE)
        self.session, vars(self.model)[ATTRIBUTE] = session, self
        try:
            yield
        finally:
            self.session, vars(self.model)[ATTRIBUTE] = before, outer

    def early_exit(self, x: torch.Tensor) -> torch.Tensor:
        assert self.served is not None
        return self.served.next_tokens.head(x.flatten(0, -2), True).view(*x.shape[:-1], -1).float()

    def last_rows(self, inputs: dict[str, torch.Tensor], place: str) -> dict[int, torch.Tensor]:
        """What `hidden.states.last_rows` finds in a model of transformers."""
        assert self.served is not None and self.session is not None
        return self.served.beside.last_rows(inputs["input_ids"][0].tolist(), place, self.session)

    @torch.no_grad()
    def run_prompt(self, inputs: dict[str, torch.Tensor], recorder: Recorder, later: bool = False) -> None:
        """As `forwards.Forwards.run_prompt`; `later`: in one forward with those of other requests of this step."""
        assert self.served is not None
        self.served.beside.read_prompt(inputs["input_ids"][0].tolist(), recorder, later)


def _reads_prompt(method: Method) -> bool:
    return isinstance(method, HiddenEdit) and method.reads_prompt
