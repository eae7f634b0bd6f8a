"""The base classes of methods that drop image tokens, and what each is shown."""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vlm_fix.arch import Arch
from vlm_fix.errors import VlmFixError
from vlm_fix.method import Layers, Method, param, parse_layers
from vlm_fix.session import PAD, Session, View
from vlm_fix.wing import Host

from .cache import ShortLayer, SplitLayer
from .columns import ImageColumns
from .encoder import ImageTokens, unreadable
from .rows import Seen, attention_chunks, keys_of, rows_attention


@dataclass(frozen=True)
class TokenPruner(Method, ABC):
    """Drops visual tokens before the language model."""

    kind: ClassVar[str] = "pruning"
    reads_flow: ClassVar[bool] = False  # `select` needs `ImageTokens.flow` of its encoder layers
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"keep": (0.5, 0.75)}
    keep: float | None = param(
        None, "visual tokens kept per image: a count (> 1) or a share in (0, 1]", above=0, counts=True
    )
    positions: str | None = param(
        None, "position ids of what is kept: re-numbered or as before (family default)", choices=("compact", "original")
    )

    def resolve(self, arch: Arch) -> Method:
        if arch.family.encoder is None and not arch.family.crosses:  # its layers would be asked for defaults
            raise VlmFixError(unreadable(arch.family, self.name))
        return super().resolve(arch)

    def defaults(self, arch: Arch) -> dict[str, Any]:
        return {"keep": 1 / 3}

    @property
    def neutral(self) -> bool:
        return self.keep == 1

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        """Vision layers whose attention column scores `select` needs."""
        return ()

    @property
    def asks(self) -> bool:
        """True if the choice depends on the prompt's words: `ImageTokens.question` is then set."""
        return False

    @property
    def exact(self) -> bool:
        """True if as many tokens as `budget` says are kept of each image, whatever it shows."""
        return True

    @abstractmethod
    def select(self, image: ImageTokens) -> torch.Tensor:
        """The tokens of one image -> indices of the kept ones, ascending."""

    def budget(self, tokens: int) -> int:
        """Number of tokens kept out of `tokens`."""
        return share_of(1.0 if self.keep is None else self.keep, tokens)


@dataclass(frozen=True)
class ImageShrinker(TokenPruner):
    """Gives the vision tower a smaller image instead of dropping tokens."""

    @abstractmethod
    def shrink(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the token grid (h, w) that the vision tower should produce for an image of `grid` tokens."""

    def select(self, image: ImageTokens) -> torch.Tensor:
        assert image.chosen is not None
        return image.chosen


@dataclass
class Tokens:
    """The prompt at the input of `layer`, as a LayerPruner sees it: B rows of n columns, left-padded."""

    layer: int
    stage: int
    hidden: torch.Tensor  # [B, n, C]
    first: torch.Tensor  # [B, n, C] the same columns at the input of layer 0
    images: torch.Tensor  # [B, n] image of its row that a column shows, from 1; 0: none
    session: Session  # in these columns
    own: Seen  # this layer, which has not run yet
    previous: Seen | None  # the layer before

    @property
    def last(self) -> torch.Tensor:
        """[B, n] True for the prompt's last token."""
        mask = torch.zeros(self.images.shape, dtype=torch.bool, device=self.hidden.device)
        mask[:, self.session.prompt_len - 1] = True
        return mask

    @property
    def question(self) -> torch.Tensor:
        """[B, n] True for the prompt's text after its last image."""
        return question_columns(self.session).to(self.hidden.device)

    def keys(self) -> torch.Tensor:
        """[B, Hkv, n, D] rotated keys of the layer before."""
        seen = self.previous
        if seen is None:
            raise VlmFixError("no keys were computed before layer 0; drop tokens later.")
        return (keys_of(seen) if seen.keys is None else seen.keys).to(self.hidden.device)

    def attention(self, rows: torch.Tensor | None = None, own: bool = False) -> torch.Tensor:
        """[B, n] attention from `rows` [B, n] (None: the last prompt token), mean over heads and rows.

        In the layer before, or with `own` in this one, whose queries and keys are then computed for it.
        """
        rows = self.last if rows is None else rows
        return self.rows(rows, own).sum(dim=1) / rows.sum(dim=1, keepdim=True).clamp(min=1)

    def rows(self, rows: torch.Tensor, own: bool = False) -> torch.Tensor:
        """[B, R, n] head-mean attention of each row in `rows` [B, n], in the layer before (or this one); then zeros."""
        seen, types = self.own if own else self.previous, self.session.types
        if seen is None:
            raise VlmFixError("no attention was computed before layer 0; drop tokens later, or without attention.")
        there = seen.x.device  # with device_map the layers around a stage may lie on different devices
        return rows_attention(seen, rows.to(there), (types != PAD).to(there)).to(self.hidden.device)


@dataclass(frozen=True)
class LayerPruner(Method):
    """Drops visual tokens inside the language model. Overwrite `stages`, `quota` and `scores`, or `choose`."""

    kind: ClassVar[str] = "pruning"
    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("stages",), ("quota", "choose"), ("scores", "choose"))

    @property
    def stages(self) -> tuple[int, ...]:
        """The layers before whose input tokens are dropped, ascending."""
        raise NotImplementedError

    @property
    def renumbers(self) -> bool:
        """True: what is left gets new positions without gaps."""
        return getattr(self, "positions", None) == "compact"

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        """Vision layers whose scores `ImageColumns.vision` must have."""
        return ()

    def quota(self, stage: int, count: int) -> int:
        """Tokens kept at a stage, of an image that had `count` tokens when it entered the language model."""
        raise NotImplementedError

    def scores(self, tokens: Tokens) -> torch.Tensor:
        """[B, n]; the highest of each image's columns are kept, the first among equals."""
        raise NotImplementedError

    def choose(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """-> [B, n] True for the visual columns that stay, and the hidden states [B, n, C], changed or not."""
        whole = tokens.session.whole.part(ImageColumns).images
        quota = functools.partial(self.quota, tokens.stage)
        return top_per_image(self.scores(tokens), tokens.images, whole, quota), tokens.hidden


def question_columns(session: Session) -> torch.Tensor:
    """[B, n] True for the prompt's text after its last image."""
    types, columns = session.types, torch.arange(session.types.shape[1])
    after = columns[None] > torch.tensor(session.last_visual)[:, None]
    after &= columns < session.prompt_len
    return after.to(types.device) & (types != PAD)


def top_per_image(
    scores: torch.Tensor, images: torch.Tensor, whole: torch.Tensor, quota: Callable[[int], int]
) -> torch.Tensor:
    """[B, n] True for the highest-scored columns of each image, `quota(its columns in whole [B, m])` many."""
    keep = torch.zeros_like(images, dtype=torch.bool)
    for row in range(len(images)):
        for image in range(1, int(whole[row].max()) + 1):
            columns = (images[row] == image).nonzero()[:, 0]
            order = scores[row, columns].sort(descending=True, stable=True).indices
            keep[row, columns[order[: quota(int((whole[row] == image).sum()))]]] = True
    return keep


def share_of(keep: float, count: int) -> int:
    """A count (> 1) or a share up to 1 of `count` tokens -> tokens, at least 1."""
    return max(1, min(count, round(keep * count) if keep <= 1 else int(keep)))


POSITIONS = param(
    None, "position ids of what is kept: re-numbered or as before (None: as the paper)", choices=("compact", "original")
)


@dataclass(frozen=True)
class StagedPruner(LayerPruner):
    """A LayerPruner with several stages: `stages` follow from `layers`, and `keep` has one entry for each."""

    shares: ClassVar[tuple[float, ...]] = ()  # the paper's shares, stage by stage
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"keep": ((0.5,), (0.75,))}

    layers: Layers = param(None, "language-model layers of the stages")
    keep: tuple[float, ...] | None = param(
        None,
        "image tokens kept per image at each stage: counts (> 1) or shares in (0, 1] of what the image had; a single one "
        "is the last stage's, the others in the paper's proportion",
        counts=True,
    )
    positions: str | None = POSITIONS

    def resolve(self, arch: Arch) -> Method:
        method = super().resolve(arch)
        assert isinstance(method, StagedPruner) and method.keep is not None
        keep, layers = method.keep, method.stages
        if len(keep) == 1 and 1 < len(layers) <= len(self.shares):
            shares = self.shares[: len(layers)]
            made = (keep[0] * share / shares[-1] for share in shares)
            keep = tuple(min(1.0, k) if keep[0] <= 1 else float(int(k)) for k in made)
            method = dataclasses.replace(method, keep=keep)
        if len(keep) != len(layers) or not all(0 < k < math.inf for k in keep):
            raise VlmFixError(
                f"{self.name}: keep={'|'.join(map(str, keep))} must have one positive entry for each of "
                f"its {len(layers)} layers, or a single one for all."
            )
        return method

    def __post_init__(self) -> None:
        if isinstance(self.keep, int | float):
            object.__setattr__(self, "keep", (float(self.keep),))
        super().__post_init__()

    @property
    def neutral(self) -> bool:
        return self.keep is not None and all(k == 1 for k in self.keep)

    @property
    def stages(self) -> tuple[int, ...]:
        assert isinstance(self.layers, tuple)
        return self.layers

    def quota(self, stage: int, count: int) -> int:
        assert self.keep is not None
        return share_of(self.keep[stage], count)


def schedule(method: StagedPruner, arch: Arch, layers: set[int]) -> dict[str, Any]:
    """Defaults of a method that re-numbers positions: its layers and as many of its `shares` as it has layers."""
    chosen = tuple(sorted(layers)) if method.layers is None else parse_layers(method.layers, arch.depth, method.name)
    return {"layers": chosen, "keep": method.shares[: len(chosen)], **compact_unless_mrope(arch)}


def compact_unless_mrope(arch: Arch) -> dict[str, Any]:
    """The default of `positions` for methods that number what is left anew: 3-D positions cannot be."""
    return {"positions": "original" if arch.family.mrope else "compact"}


@dataclass
class Cached:
    """One layer after its self-attention, as a CachePruner sees it: n columns, left-padded; keys are rotated.

    After the prompt `keys` and `values` are all of it, whatever was dropped since; after a later step what it computed.
    """

    host: Host
    layer: int
    session: Session
    seen: Seen  # seen.x [B, q, C]: what went into self-attention; after the prompt q = n
    keys: torch.Tensor  # [B, Hkv, n, D]
    values: torch.Tensor  # [B, Hkv, n, D]
    valid: torch.Tensor  # [B, n] False on padding
    query: torch.Tensor | None = None  # after a step: its queries [B, H, q, D], rotated

    def last_row(self) -> torch.Tensor:
        """[B, n] causal softmax attention of the prompt's last token, mean over heads."""
        rows = torch.zeros_like(self.valid)
        rows[:, self.session.prompt_len - 1] = True
        return rows_attention(self.seen, rows, self.valid)[:, 0]

    def step_rows(self) -> torch.Tensor:
        """[B, H, q, n] softmax attention of the rows of a step after the prompt."""
        attn, view = self.seen.attn, self.session.at(self.layer)
        assert isinstance(view, View) and self.query is not None
        mask = view.attention_mask(self.keys.device)
        chunks = [*attention_chunks(self.query, self.keys, None if mask is None else mask[:, 0], attn.scaling)]
        return torch.cat(chunks, dim=2) if len(chunks) > 1 else chunks[0]


@dataclass(frozen=True)
class CachePruner(Method):
    """Drops keys and values of visual tokens after the prompt. Overwrite `scores`."""

    kind: ClassVar[str] = "pruning"
    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("scores",),)
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"keep": (0.75,)}

    rewrites: ClassVar[bool] = False  # it changes keys and values in `rewrite`, whether or not any are dropped
    keep: float = param(0.5, "keys kept per image and layer: a count (> 1) or a share in (0, 1]", above=0, counts=True)
    layers: Layers = param(None, "language-model layers whose cache is pruned")

    @property
    def neutral(self) -> bool:
        return self.keep == 1

    @property
    def wanders(self) -> bool:
        """True if what a step computes depends on the steps before it: rows then cannot change places, as beams do."""
        return False

    @property
    def together(self) -> bool:
        """True if `choose` is asked once for all layers, when the last of them has read the prompt."""
        return False

    def scores(self, cached: Cached) -> torch.Tensor:
        """[B, Hkv, n] or [B, 1, n] (the same choice in all heads); the highest of each image's columns are kept."""
        raise NotImplementedError

    def choose(self, scores: dict[int, torch.Tensor], images: torch.Tensor) -> dict[int, torch.Tensor]:
        """Scores of layers, images [B, n] as in `ImageColumns` -> by layer [B, Hkv or 1, n] True for image columns to keep.

        In every head of a layer as many of a row.
        """
        quota = functools.partial(share_of, self.keep)
        return {
            i: torch.stack([top_per_image(s, images, images, quota) for s in layer.unbind(dim=1)], dim=1)
            for i, layer in scores.items()
        }

    def rewrite(self, cached: Cached, layer: ShortLayer, scores: torch.Tensor, images: torch.Tensor) -> None:
        """If it `rewrites`: change what is left of the prompt in `layer`, of the scores [B, Hkv, n] and images [B, n]."""

    def before_step(self, session: Session, i: int, layer: SplitLayer) -> None:
        """If it wanders: before layer i computes a step after the prompt."""

    def after_prompt(self, cached: Cached, scores: torch.Tensor, layer: SplitLayer) -> None:
        """If it wanders: `layer` was pruned to the columns of session.at(i), whose scores are [B, m]."""

    def after_step(self, cached: Cached, layer: SplitLayer) -> None:
        """If it wanders: after a step's self-attention over the columns of session.at(i)."""
