"""Dropping visual tokens inside the language model, before the input of chosen layers, in one or several stages.

A pre-hook on each layer behind a drop gives it fewer hidden states, their rotary tables and a mask of its own; the cache
of each layer is as long as what reached it, and layer 0's keeps reporting the length that generate counts with.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlm_fix.arch import Arch
from vlm_fix.errors import VlmFixError
from vlm_fix.families.compat import cache_of
from vlm_fix.method import Layers, Method, param, parse_layers
from vlm_fix.session import PAD, VISUAL, Session, View, left_pack

from .encoder import chunk_bytes


@dataclass
class Seen:
    """One layer's self-attention over the prompt: what went into it [B, n, C], the rotary tables, the keys if cached."""

    attn: Any
    x: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    keys: torch.Tensor | None = None


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
        assert self.session.prompt_len is not None
        mask[:, self.session.prompt_len - 1] = True
        return mask

    @property
    def question(self) -> torch.Tensor:
        """[B, n] True for the prompt's text after its last image."""
        types, columns = self.session.types, torch.arange(self.images.shape[1])
        assert types is not None and self.session.prompt_len is not None
        after = columns[None] > torch.tensor(self.session.last_visual)[:, None]
        after &= columns < self.session.prompt_len
        return (after.to(types.device) & (types != PAD)).to(self.hidden.device)

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
        assert types is not None
        return rows_attention(seen, rows, (types != PAD).to(self.hidden.device))


def rows_attention(seen: Seen, rows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention of chosen rows, float32 [B, R, n], mean over heads, R = the most rows of a sample.

    rows, valid [B, n]. Only the chosen rows are ever formed, in chunks; shorter samples end in rows of zeros.
    """
    return torch.cat([a.mean(dim=1) for a in attention_chunks(*_chosen(seen, rows, valid))], dim=1)


def received(seen: Seen, rows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, n] causal softmax attention that columns get from chosen rows: summed over them and a key head's queries.

    rows, valid [B, n]; float32, in chunks as in `rows_attention`.
    """
    query, keys, *rest = _chosen(seen, rows, valid)
    parts = [a.unflatten(1, (keys.shape[1], -1)).sum(dim=(2, 3)) for a in attention_chunks(query, keys, *rest)]
    return torch.stack(parts).sum(dim=0)


def _chosen(seen: Seen, rows: torch.Tensor, valid: torch.Tensor) -> tuple[Any, ...]:
    """What `attention_chunks` takes for chosen rows; the rows that a sample has less than others may look nowhere."""
    attn, x = seen.attn, seen.x
    count = max(1, int(rows.sum(dim=1).max()))
    index = rows.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]  # [B, R], chosen ones first
    real = rows.gather(1, index)
    cos, sin = (t.expand(len(x), -1, -1) for t in seen.rotary)
    keys = rotated(attn, unrotated(attn, x, "k"), cos, sin) if seen.keys is None else seen.keys
    picked, cos, sin = (t.gather(1, index[..., None].expand(-1, -1, t.shape[-1])) for t in (x, cos, sin))
    columns = torch.arange(x.shape[1], device=x.device)
    allowed = (columns <= index[..., None]) & valid[:, None] & real[..., None]
    return rotated(attn, unrotated(attn, picked), cos, sin), keys, allowed, attn.scaling


def attention_chunks(
    query: torch.Tensor, keys: torch.Tensor, allowed: torch.Tensor | None, scaling: float
) -> Iterator[torch.Tensor]:
    """Softmax attention of rotated queries [B, H, R, D] to keys [B, Hkv, n, D]: [B, H, r, n], chunk by chunk of rows.

    allowed [B, R, n], None: all. In float32; a row without any allowed column is zero.
    """
    batch, heads, count, dim = query.shape
    keys = keys.float().transpose(2, 3)
    step = max(1, chunk_bytes(query) // (4 * batch * heads * keys.shape[-1]))
    for i in range(0, count, step):
        part = query[:, :, i : i + step].float().reshape(batch, keys.shape[1], -1, dim)
        z = (part @ keys).view(batch, heads, -1, keys.shape[-1]) * scaling
        if allowed is None:
            yield z.softmax(dim=-1)
        else:
            yield z.masked_fill(~allowed[:, None, i : i + step], -torch.inf).softmax(dim=-1).nan_to_num(0.0)


def unrotated(attn: Any, x: torch.Tensor, what: str = "q") -> torch.Tensor:
    """Inputs of self-attention [B, n, C] -> queries or keys [B, H, n, D], normalised where the model does so."""
    return by_head(attn, getattr(attn, f"{what}_proj")(x), what)


def by_head(attn: Any, y: torch.Tensor, what: str = "q") -> torch.Tensor:
    """What `q_proj` or `k_proj` made [B, n, H D] -> [B, H, n, D], normalised where the model does so."""
    y = y.view(*y.shape[:2], -1, attn.head_dim)
    return getattr(attn, f"{what}_norm", torch.nn.Identity())(y).transpose(1, 2)


def rotated(attn: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[B, H, n, D] turned by the rotary tables [B, n, D], as the model's own module does it."""
    return sys.modules[type(attn).__module__].apply_rotary_pos_emb(x, x, cos, sin)[0]


@dataclass(frozen=True)
class LayerPruner(Method):
    """Drops visual tokens inside the language model. Overwrite `stages`, `quota` and `scores`, or `choose`."""

    name: ClassVar[str] = "layer_pruner"
    kind: ClassVar[str] = "pruning"

    @property
    def stages(self) -> tuple[int, ...]:
        """The layers before whose input tokens are dropped, ascending."""
        raise NotImplementedError

    @property
    def renumbers(self) -> bool:
        """True: what is left gets new positions without gaps."""
        return getattr(self, "positions", None) == "compact"

    def encoder_layers(self, arch: Arch) -> tuple[int, ...]:
        """Vision layers whose scores `session.vision` must have."""
        return ()

    def quota(self, stage: int, count: int) -> int:
        """Tokens kept at a stage, of an image that had `count` tokens when it entered the language model."""
        raise NotImplementedError

    def scores(self, tokens: Tokens) -> torch.Tensor:
        """[B, n]; the highest of each image's columns are kept, the first among equals."""
        raise NotImplementedError

    def choose(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """-> [B, n] True for the visual columns that stay, and the hidden states [B, n, C], changed or not."""
        whole = tokens.session.whole.images
        assert whole is not None
        quota = functools.partial(self.quota, tokens.stage)
        return top_per_image(self.scores(tokens), tokens.images, whole, quota), tokens.hidden


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

    name: ClassVar[str] = "staged_pruner"
    shares: ClassVar[tuple[float, ...]] = ()  # the paper's shares, stage by stage

    layers: Layers = param(None, "language-model layers of the stages")
    keep: tuple[float, ...] | None = param(
        None,
        "image tokens kept per image at each stage: counts (> 1) or shares in (0, 1] of what the image had; a single one "
        "is the last stage's, the others in the paper's proportion",
    )
    positions: str | None = POSITIONS

    def resolve(self, arch: Arch) -> Method:
        method = super().resolve(arch)
        assert isinstance(method, StagedPruner) and method.keep is not None
        keep, layers = method.keep, method.stages
        if len(keep) == 1 and 1 < len(layers) <= len(self.shares):
            shares, limit = self.shares[: len(layers)], 1.0 if keep[0] <= 1 else math.inf
            keep = tuple(min(limit, keep[0] * share / shares[-1]) for share in shares)
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


class ShortLayer(DynamicLayer):
    """A cache layer that holds `dropped` columns fewer than the sequence has; it reports the sequence's length."""

    dropped = 0

    @classmethod
    def of(cls, layer: Any, dropped: int) -> ShortLayer:
        """A DynamicLayer as a ShortLayer."""
        if type(layer) is not DynamicLayer:
            raise VlmFixError(
                f"dropping tokens does not work with a {type(layer).__name__} of the cache; use the default dynamic cache."
            )
        short = cls()
        short.__dict__.update(layer.__dict__)
        short.dropped = dropped
        return short

    def get_seq_length(self) -> int:
        length = super().get_seq_length()
        return length + self.dropped if length else 0


def check_model(engine: Any, method: Method, prompt: bool = True) -> None:
    """Refuse decoders with sliding windows and, for what acts in the prompt, those that tie image tokens to their places."""
    config = engine.model.config.get_text_config()
    reason = "sliding windows" if set(getattr(config, "layer_types", None) or ()) - {"full_attention"} else ""
    if prompt and getattr(getattr(engine.model.config, "vision_config", None), "deepstack_visual_indexes", None):
        reason = "image features of several depths"
    if prompt and (getattr(config, "use_bidirectional_attention", None) or "gemma" in config.model_type):
        reason = reason or "bidirectional image attention"
    if reason:
        raise VlmFixError(
            f"{method.name} does not work with this model's {reason}; use a pruner that acts before the language model."
        )


def install(engine: Any) -> list[Any]:
    """The hooks of engine.dropper."""
    dropper, layers = engine.dropper, engine.language.layers
    check_model(engine, dropper)
    if engine.family.mrope and dropper.renumbers:
        raise VlmFixError(
            f"{dropper.name}: positions=compact has no meaning for M-RoPE's 3-D positions; use positions=original."
        )
    stages = dropper.stages
    if not stages or any(not 0 <= s < len(layers) for s in stages) or list(stages) != sorted(set(stages)):
        raise VlmFixError(
            f"{dropper.name} drops tokens before layers {', '.join(map(str, stages)) or '(none)'}; name layers between 0 "
            f"and {len(layers) - 1}, each once, ascending."
        )

    def enter(i: int, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        session = engine.session
        if session is None or session.plain:
            return None
        x, stage = args[0] if args else kwargs["hidden_states"], stages.index(i) if i in stages else None
        if i == 0 and session.start == 0:
            session.state(dropper)["first"] = x
        if stage is not None and session.start == 0 and max(session.last_visual) >= 0:
            x = drop(engine, session, i, stage, module, x, kwargs)
        view = session.at(i)
        if not isinstance(view, View):
            return None
        tables = rotary(engine, view, x, kwargs["position_embeddings"])
        changed = {"attention_mask": view.attention_mask(x.device), "position_embeddings": tables, "position_ids": None}
        return (x, *args[1:]) if args else (), {**kwargs, **changed} | ({} if args else {"hidden_states": x})

    def note(i: int, attn: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        session, cache = engine.session, cache_of(kwargs)
        if session is None or session.plain or session.start or max(session.last_visual) < 0:
            return
        view = session.at(i)
        if i == 0 and isinstance(view, View) and cache is not None:
            cache.layers[0] = ShortLayer.of(cache.layers[0], view.dropped)
        x = args[0] if args else kwargs["hidden_states"]
        keys = cache.layers[i].keys if cache is not None else None
        if i + 1 in stages:
            session.state(dropper)["seen"] = Seen(attn, x, kwargs["position_embeddings"], keys)

    noted = {s - 1 for s in stages if s} | {0}
    handles = [
        layer.register_forward_pre_hook(functools.partial(enter, i), with_kwargs=True)
        for i, layer in enumerate(layers)
        if i >= stages[0] or i == 0
    ]
    handles += [layers[i].self_attn.register_forward_hook(functools.partial(note, i), with_kwargs=True) for i in noted]
    return handles


@torch.no_grad()
def drop(engine: Any, session: Session, i: int, stage: int, layer: Any, x: torch.Tensor, kwargs: Any) -> torch.Tensor:
    """Run a stage: -> the hidden states that enter layer `i`; session.views tells the later layers."""
    dropper, before, state = engine.dropper, session.at(i), session.state(engine.dropper)
    cache = cache_of(kwargs)
    if cache is not None and not isinstance(cache, DynamicCache):
        raise VlmFixError(f"{dropper.name} does not work with a {type(cache).__name__}; use the default dynamic cache.")
    assert session.images is not None and before.types is not None
    first = state["first"]
    if isinstance(before, View):
        index = before.index[..., None].expand(-1, -1, first.shape[-1])
        first = first.gather(1, index.to(first.device))
    images = before.translate(session.images, session).to(x.device)
    tables = rotary(engine, before, x, kwargs["position_embeddings"]) if before is not session else None
    own = Seen(layer.self_attn, layer.input_layernorm(x), tables or kwargs["position_embeddings"])
    previous = state.get("seen") if i else None
    chosen, hidden = dropper.choose(Tokens(i, stage, x, first.to(x.device), images, before, own, previous))
    if i == dropper.stages[-1]:
        state.clear()
    types = before.types.to(x.device)
    keep = (images == 0) & (types != PAD) | (chosen & (types == VISUAL))  # a newline of a cut image belongs to no image
    if bool((keep | (types == PAD)).all()):
        return hidden
    index, mask = left_pack(keep)
    session.drop(range(i, len(engine.language.layers)), index.to(before.types.device), mask.to(before.types.device))
    return hidden.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def rotary(
    engine: Any, view: Session, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, q, D] of this forward's rows in the columns of `view`, from those of the whole session."""
    if engine.dropper.renumbers:
        assert view.types is not None
        positions = ((view.types != PAD).long().cumsum(dim=1) - 1).clamp(min=0)[:, view.start :]
        return engine.language.rotary_emb(x, positions.to(x.device))
    if view.start or not isinstance(view, View):
        return tables
    index = view.index[..., None].to(x.device)
    cos, sin = (t.expand(len(index), -1, -1).gather(1, index.expand(-1, -1, t.shape[-1])) for t in tables)
    return cos, sin
