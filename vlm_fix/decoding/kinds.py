"""The base classes of methods that act while tokens are chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix.call import Call
from vlm_fix.method import Method
from vlm_fix.session import Session

from .search import Search
from .step import Step


def log_probs(scores: torch.Tensor, unless: bool = False) -> torch.Tensor:
    """Scores [B, V] as log-probabilities, or as they are."""
    return scores if unless else scores.log_softmax(dim=-1)


@dataclass(frozen=True)
class Negative:
    """A second branch of a contrast: its prompt, and what it does to the prompt's image features.

    inputs: model inputs, as in `Call.inputs`; the vision tower runs again only if pixel_values is another tensor.
    features: [N, C] image embeddings of the whole batch, in order -> the same, changed.
    """

    inputs: dict[str, Any]
    features: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class Contrast(Method):
    """Contrasts the next-token distribution with that of a second branch with its own cache.

    A branch may have another prompt, other image features, or an attention edit that is active only in it: the method is
    then an AttentionEdit too, with branch="negative".
    """

    kind: ClassVar[str] = "contrast"
    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("negative", "branches"), ("combine", "combine_at"))
    on_logits: ClassVar[bool] = False
    """True: `combine` gets the branches' logits. Their level is seen by generate's own processors: a repetition penalty
    divides positive scores and multiplies negative ones."""
    gated: ClassVar[bool] = False
    """True if it may rightly leave a whole answer as it is; of others that do, the user is told."""

    @property
    def contrasts(self) -> bool:
        """False if these parameters need no second branch."""
        return not self.neutral

    @property
    def fork(self) -> int | None:
        """The layer up to whose input a branch with the main branch's own prompt equals it; None: no such layer."""
        return None

    def stays(self, session: Session) -> torch.Tensor | None:
        """[B, n] columns of a branch's prompt that its layers from `fork` on keep at all; None: every one."""
        return None

    @property
    def passes(self) -> int:
        """Forward passes per generated token, the model's own included: what an equal-compute baseline may spend."""
        return 2 if self.contrasts else 1

    def negative(self, call: Call) -> dict[str, torch.Tensor]:
        """Model inputs of the second branch's prompt: `call.inputs`, `call.without_images()`, `call.with_pixels(f)`, ..."""
        raise NotImplementedError

    def branches(self, call: Call) -> dict[str, Negative]:
        """The second branches by name; each has its own cache. An AttentionEdit asks for the name in `acts_in`."""
        return {"negative": Negative(self.negative(call))}

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        """[B, V] float32 log-probabilities of both branches (logits: `on_logits`) -> scores, -inf where cut off. Pure.

        They need not sum to 1: generate's own processors get them as they are. Beam search, which adds scores up, gives
        log-probabilities in any case, and gets these scores normalised.
        """
        raise NotImplementedError

    def combine_at(self, step: int, l: torch.Tensor, *negatives: torch.Tensor) -> torch.Tensor:
        """`combine` after `step` generated tokens, for a strength that changes as the answer grows or several branches."""
        return self.combine(l, *negatives)


@dataclass(frozen=True)
class LogitEdit(Method, ABC):
    """Changes the next-token distribution of the one branch there is, after any contrast; acts in `generate` only."""

    kind: ClassVar[str] = "logits"
    needs_image: ClassVar[bool] = False
    on_logits: ClassVar[bool] = False  # these two as of a Contrast
    gated: ClassVar[bool] = False

    @property
    def exits(self) -> tuple[int, ...]:
        """Layers whose input `step.exit` is asked for (entry i of transformers' hidden_states is layer i's input)."""
        return ()

    @property
    def edits_logits(self) -> bool:
        """False if `edit` does nothing with these parameters, for a method that does something else besides."""
        return True

    @abstractmethod
    def edit(self, l: torch.Tensor, step: Step) -> torch.Tensor:
        """[B, V] float32 log-probabilities (logits: `on_logits`) -> scores, -inf where cut off. Pure."""


@dataclass(frozen=True)
class Procedure(Method):
    """A small program around `generate`: a `Refiner` or a `Searcher`."""

    kind: ClassVar[str] = "procedure"
    needs_image: ClassVar[bool] = False


@dataclass(frozen=True)
class Refiner(Procedure, ABC):
    """A procedure that gives `generate` other inputs."""

    @abstractmethod
    def refine(self, call: Call) -> dict[str, Any]:
        """Return inputs that replace those in `call.inputs` before anything is generated, such as pixel_values."""


@dataclass(frozen=True)
class Searcher(Procedure, ABC):
    """A procedure that chooses the tokens in a decoding loop of its own."""

    refuses: ClassVar[dict[str, str]] = {}
    """Options of `generate` it cannot serve -> what to do instead, as the end of a sentence."""

    @abstractmethod
    def search(self, run: Search) -> Any:
        """Prefill, choose the tokens, return `run.output(...)`: what `generate` returns.

        `generate` still prepares inputs, processors and stopping.
        """
