"""The base classes of methods that act while tokens are chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix.arch import Arch
from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.method import Method, param, shaped
from vlm_fix.session import Session

from .search import Search
from .step import Step


def log_probs(scores: torch.Tensor, unless: bool = False) -> torch.Tensor:
    """Scores [B, V] as log-probabilities, or as they are."""
    return scores if unless else scores.log_softmax(dim=-1)


def entropy(p: torch.Tensor, normalised: bool = False) -> torch.Tensor:
    """Probabilities [B, V] -> entropy [B, 1] in nats; normalised: over log V, from 0 to 1."""
    h = torch.special.entr(p).sum(dim=-1, keepdim=True)
    return h / torch.tensor(p.shape[-1]).log() if normalised else h


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

    What every contrast can do besides: with z its scores and l the main branch's, z <- l + w (z - l) where z is not cut
    off; w = H(p) in nats (entropy=nats; DeCoRe, arXiv 2410.18860), or H(p) / log V (entropy=normalised). Where max p >=
    `gate` the row keeps l, uncut (CHASD, arXiv 2605.23344). gate=1 and entropy=none change nothing.
    """

    kind: ClassVar[str] = "contrast"
    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("negative", "branches"), ("combine", "combine_at"))
    on_logits: ClassVar[bool] = False
    """True: `combine` gets the branches' logits. Their level is seen by generate's own processors: a repetition penalty
    divides positive scores and multiplies negative ones."""
    own_keys: ClassVar[bool] = False
    """True: a branch has other keys than the main one even where their prompts are the same."""
    gated: ClassVar[bool] = False
    """True if it may rightly leave a whole answer as it is; of others that do, the user is told."""

    gate: float = param(
        1.0, "contrast only where the model's own top probability is below this", above=0, high=1, by_name=True
    )
    entropy: str = param(
        "none",
        "scale what the contrast adds by the entropy of the model's own distribution",
        choices=("none", "nats", "normalised"),
        by_name=True,
    )

    def resolve(self, arch: Arch) -> Method:
        method = super().resolve(arch)
        assert isinstance(method, Contrast)
        if not (method.neutral or method.contrasts) and (method.gate, method.entropy) != (1, "none"):
            raise VlmFixError(
                f"{self.name}: gate and entropy act on its contrast, which these parameters turn off; leave them out."
            )
        return method

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

    def sure(self, l: torch.Tensor) -> torch.Tensor | None:
        """[B, V] of the main branch -> [B, 1] True for rows that are not contrasted; None: every row is."""
        return None if self.gate == 1 else l.softmax(dim=-1).amax(dim=-1, keepdim=True) >= self.gate

    def contrasted(self, step: int, l: torch.Tensor, *negatives: torch.Tensor) -> torch.Tensor:
        """`combine_at`, as `entropy` scales and `gate` limits it: what is sampled from. VlmFixError for another shape."""
        new: torch.Tensor = shaped(self.combine_at(step, l, *negatives), l, self, "combine")
        if self.entropy != "none":
            scaled = l + entropy(l.softmax(dim=-1), self.entropy == "normalised") * (new - l)
            new = torch.where(new.isfinite() & l.isfinite(), scaled, new)
        sure = self.sure(l)
        return new if sure is None else torch.where(sure, l, new)


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
