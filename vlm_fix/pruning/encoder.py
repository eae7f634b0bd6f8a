"""What a vision tower tells pruners: attention scores recomputed in the layers that need them, and its features."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.vision_utils import get_vision_window_index

from vlm_fix import compiled
from vlm_fix.arch import Family
from vlm_fix.errors import VlmFixError
from vlm_fix.families import FAMILIES, anyres_index, anyres_side, video_token_id, vision_blocks
from vlm_fix.wing import Host, engine_of

Heads = tuple[torch.Tensor, torch.Tensor, float]
"""Queries and keys [H, S, D] of one image in the tower's own order of its S columns, and the scale of their product."""


@dataclass
class ImageTokens:
    """One image as a pruner sees it: N = h * w visual tokens in reading order."""

    grid: tuple[int, int]
    scores: dict[int, torch.Tensor]  # vision layer -> [N] attention received, mean over heads and over queries
    first: dict[int, torch.Tensor] = field(default_factory=dict)  # the same from the class token; without one, `scores`
    keys: dict[int, torch.Tensor] = field(default_factory=dict)  # vision layer -> [N, D] keys, mean over heads
    heads: dict[int, list[Heads]] = field(
        default_factory=dict
    )  # fully attending layer -> of the image, or of each frame
    flow: dict[int, torch.Tensor] = field(
        default_factory=dict
    )  # vision layer -> [N, 3] of `flow_of`, if a method reads it
    features: torch.Tensor | None = None  # [N, C] after the projector, as the language model gets them
    chosen: torch.Tensor | None = None  # the tokens that exist at all, when the image was shrunk before the tower
    here: torch.Tensor | None = None  # one crop of an image: its tokens that the prompt shows; None: all N
    siblings: int = 1  # crops of the same image, this one among them
    frames: int = 1  # of a video: N / frames tokens each, one frame after the other
    question: torch.Tensor | None = None  # [M, C] embeddings of the prompt's text after its last image
    pixels: torch.Tensor | None = None  # the image as the tower gets it: the same bits alone and in a batch
    video: bool = False  # True for a video, all its frames one under the other
    raw: Callable[[], torch.Tensor] | None = None  # -> [N, ..., Cv] before the projector (Qwen-VL: [N, merge^2, Cv])
    project: Callable[[torch.Tensor], torch.Tensor] | None = None  # [..., N, ..., Cv] -> [..., N, C], in float32


@dataclass
class Seen:
    """One vision layer over all images; S = patches, and the class token if the tower has one."""

    received: torch.Tensor  # [..., S]
    keys: torch.Tensor  # [..., S, D], mean over heads
    heads: list[Heads]  # per image; with windowed attention per window
    first: torch.Tensor | None = None  # [..., S] attention of the first column's query, mean over heads
    flow: torch.Tensor | None = (
        None  # [..., S, 3] or, for a first column that may be a class token or not, [2, ..., S, 3]
    )


def chunk_bytes(x: torch.Tensor) -> int:
    """Bytes of float32 to form at once where `x` lives: on a CPU what its cache holds, on CUDA enough to fill it."""
    return (64 if x.is_cuda else 2) * 2**20


def column_means(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """[n, H, S, D] x2 -> [n, S]: softmax attention that each column receives, mean over heads and queries. Chunked."""
    images, heads, count, _ = query.shape
    step = max(1, chunk_bytes(query) // (4 * images * heads * count))
    query, key = query.float() * scaling, key.float().transpose(2, 3)
    total = torch.zeros(images, count, device=query.device)
    for part in query.split(step, dim=2):
        total += (part @ key).softmax(dim=-1).sum(dim=(1, 2))
    return total / (heads * count)


def flow_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, classed: bool) -> torch.Tensor:
    """Queries, keys and values [n, H, S, D] of a layer -> [n, S, 3]: what flows from each column to the whole image.

    Means over heads of the attention that a query pays, and of the softmax of its value's products with all values; then
    |v|_1 of the value's mean. The query is the class token's, the first; without one it is the mean of all, and the second
    entry 0.
    """
    q, k, v = q.float(), k.float(), v.float()
    asking = q[:, :, :1] if classed else q.mean(dim=2, keepdim=True)
    relation = (asking @ k.mT * scale).softmax(dim=-1).mean(dim=1)[:, 0]
    semantic = (v[:, :, :1] @ v.mT).softmax(dim=-1).mean(dim=1)[:, 0] if classed else torch.zeros_like(relation)
    return torch.stack([relation, semantic, v.mean(dim=1).abs().sum(dim=-1)], dim=-1)


@compiled.uncompiled
def in_float32(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`module` on `x`, computed in float32 whatever the dtype of its weights; packed ones compute in their own way."""
    packed = [p for p in module.parameters() if not p.is_floating_point()]
    if packed:
        own = next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)
        return module(x.to(own)).float()
    with Float32({id(p) for p in module.parameters()}):
        return module(x.float())


class Float32(TorchFunctionMode):
    """While it is on, functions see these parameters in float32, in this thread: others may be running the same module."""

    def __init__(self, parameters: set[int]):
        super().__init__()
        self.parameters = parameters

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def seen(x: Any) -> Any:
            return x.float() if id(x) in self.parameters else x

        return func(*map(seen, args), **{name: seen(x) for name, x in (kwargs or {}).items()})


class Clip:
    """CLIP-like towers: images [n, 3, H, W], a CLS column unless the feature selection keeps it out of the tokens."""

    def __init__(self, model: Any, flows: bool = False):
        self.config, self.projector, self.flows = model.config, model.model.multi_modal_projector, flows

    def attention(self, attn: Any, args: Any, kwargs: dict[str, Any]) -> Seen:
        x = args[0] if args else kwargs["hidden_states"]
        shape = (*x.shape[:2], attn.num_heads, attn.head_dim)
        q, k = (f(x).view(shape).transpose(1, 2) for f in (attn.q_proj, attn.k_proj))
        return self.seen(q, k, attn.v_proj(x).view(shape).transpose(1, 2) if self.flows else None, attn.scale)

    @staticmethod
    def seen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, scale: float) -> Seen:
        """Queries, keys and, for its flow, values [n, H, S, D] of a layer."""
        first = (q[:, :, :1].float() @ k.float().transpose(2, 3) * scale).softmax(dim=-1).mean(dim=1)[:, 0]
        heads = [(a, b, scale) for a, b in zip(q, k, strict=True)]
        flow = None if v is None else torch.stack([flow_of(q, k, v, scale, classed) for classed in (False, True)])
        return Seen(column_means(q, k, scale), k.float().mean(dim=1), heads, first, flow)

    def images(self, args: Any, kwargs: dict[str, Any], output: Any, seen: dict[int, Seen]) -> Iterator[ImageTokens]:
        layers = self.config.vision_feature_layer
        states = [output.hidden_states[i] for i in ([layers] if isinstance(layers, int) else layers)]
        return self.tokens(args[0] if args else kwargs["pixel_values"], states, seen)

    def tokens(self, pixels: torch.Tensor, states: list[torch.Tensor], seen: dict[int, Seen]) -> Iterator[ImageTokens]:
        """Images [n, 3, H, W] and the tower's outputs [n, S, C] that go to the projector."""
        patch = self.config.vision_config.patch_size
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        size = grid[0] * grid[1]

        def raw(i: int) -> torch.Tensor:
            return torch.cat([x[i, -size:] for x in states], dim=-1)

        has_class = any(s.received.shape[1] > size for s in seen.values())
        for i in range(len(pixels)):
            received = {layer: s.received[i, -size:] for layer, s in seen.items()}
            classed = {layer: s.first[i, -size:] for layer, s in seen.items() if s.first is not None}
            yield ImageTokens(
                grid,
                received,
                classed if has_class else received,
                {layer: s.keys[i, -size:] for layer, s in seen.items()},
                {layer: [s.heads[i]] for layer, s in seen.items()},
                {layer: s.flow[int(has_class), i, -size:] for layer, s in seen.items() if s.flow is not None},
                pixels=pixels[i],
                raw=functools.partial(raw, i),
                project=functools.partial(in_float32, self.projector),
            )


class QwenVL:
    """Qwen-VL's towers: packed patches, in Qwen2.5-VL in window order; scores are averaged over each merge unit and put
    in reading order."""

    def __init__(self, model: Any, flows: bool = False):
        self.tower, self.flows = model.model.visual, flows

    def attention(self, attn: Any, args: Any, kwargs: dict[str, Any]) -> Seen:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

        x = args[0] if args else kwargs["hidden_states"]
        q, k, v = attn.qkv(x).reshape(len(x), 3, attn.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
        q, k = apply_rotary_pos_emb_vision(q, k, *kwargs["position_embeddings"])
        return self.seen(q, k, v if self.flows else None, kwargs["cu_seqlens"], attn.scaling)

    @staticmethod
    def seen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, bounds: torch.Tensor, scale: float) -> Seen:
        """Queries, keys and, for its flow, values [S, H, D] of a layer, whose windows begin at `bounds`."""
        lengths = bounds.diff().tolist()
        pairs = zip(q.transpose(0, 1).split(lengths, dim=1), k.transpose(0, 1).split(lengths, dim=1), strict=True)
        heads = [(a, b, scale) for a, b in pairs]
        received = torch.cat([column_means(a[None], b[None], scale)[0] for a, b, _ in heads])
        if v is None:
            return Seen(received, k.float().mean(dim=1), heads)
        parts = zip(heads, v.transpose(0, 1).split(lengths, dim=1), strict=True)
        flow = torch.cat([flow_of(a[None], b[None], c[None], scale, False)[0] for (a, b, _), c in parts])
        return Seen(received, k.float().mean(dim=1), heads, flow=flow)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return in_float32(self.tower.merger, x.flatten(0, -2)).view(*x.shape[:-2], -1)

    def images(self, args: Any, kwargs: dict[str, Any], output: Any, seen: dict[int, Seen]) -> Iterator[ImageTokens]:
        patches = args[0] if args else kwargs["hidden_states"]
        grid_thw = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        return self.tokens(patches, grid_thw, output.last_hidden_state, seen)

    def tokens(
        self, patches: torch.Tensor, grid_thw: torch.Tensor, states: torch.Tensor, seen: dict[int, Seen]
    ) -> Iterator[ImageTokens]:
        """Patches of all images [S, ...], their grids [n, 3] and what goes to the merger [S, Cv], in the tower's order."""
        merge = self.tower.spatial_merge_size
        order = torch.arange(len(patches) // merge**2)
        if window := getattr(self.tower, "window_size", None):
            size, side = {"spatial_merge_size": merge, "window_size": window}, self.tower.patch_size
            order = torch.argsort(get_vision_window_index(grid_thw, **size, patch_size=side)[0])

        def units(x: torch.Tensor) -> torch.Tensor:
            return x.view(-1, merge**2, *x.shape[1:])

        def in_order(x: torch.Tensor) -> torch.Tensor:
            return units(x).mean(dim=1)[order.to(x.device)]

        def raw(here: slice) -> torch.Tensor:
            return units(states)[order[here].to(states.device)]

        scores = {layer: in_order(s.received) for layer, s in seen.items()}
        keys = {layer: in_order(s.keys) for layer, s in seen.items()}
        flow = {layer: in_order(s.flow) for layer, s in seen.items() if s.flow is not None}
        start = frame = 0
        frames = int(grid_thw[:, 0].sum())
        for t, h, w in grid_thw.tolist():
            n, frame = t * h * w // merge**2, frame + t
            here = slice(start, start + n)
            received = {layer: u[here] for layer, u in scores.items()}
            yield ImageTokens(
                (t * h // merge, w // merge),
                received,
                received,
                {layer: u[here] for layer, u in keys.items()},
                {layer: s.heads[frame - t : frame] for layer, s in seen.items() if len(s.heads) == frames},
                {layer: u[here] for layer, u in flow.items()},
                pixels=patches[start * merge**2 : (start + n) * merge**2],
                frames=t,
                raw=functools.partial(raw, here),
                project=self.project,
            )
            start += n


def unreadable(family: Family, name: str) -> str:
    """Why the method `name`, which looks into the vision tower, is refused."""
    known = ", ".join(f.name for f in FAMILIES if f.encoder)
    return f"{name} cannot read the vision tower of {family.name} models; it works with {known}."


class Looks(threading.local):
    """What the layers of the tower have shown in its run in this thread."""

    def __init__(self) -> None:
        self.seen: dict[int, Seen] = {}


def capture(
    engine: Host, tower: nn.Module, layers: tuple[int, ...], into: str = "vision", flows: bool = False
) -> Iterator[Any]:
    """Hooks that append one ImageTokens per image to the running call (its list `into`) whenever the tower runs.

    flows: with `ImageTokens.flow` of the layers.
    """
    if engine.family.encoder is None:
        looking = [m.name for m in engine.active if m.encoder_layers(engine.arch) is not None]
        raise VlmFixError(unreadable(engine.family, looking[0]))
    encoder: Any = {"clip": Clip, "qwen": QwenVL}[engine.family.encoder](engine.model, flows)
    blocks, looks = vision_blocks(engine.model, engine.family), Looks()

    def note(layer: int) -> Any:
        def hook(attn: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            with torch.no_grad():
                looks.seen[layer] = encoder.attention(attn, args, kwargs)

        return hook

    def collect(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        session = engine.session  # plain: a method's own pass over the prompt, which sees the images once more
        call = (None if session and session.plain else engine.call) or (session and session.call)
        seen, looks.seen = looks.seen, {}
        if call is not None:
            found, known = list(encoder.images(args, kwargs, output, seen)), getattr(call, into)
            video = bool(found) and shows_video(found, known, call.inputs)
            known.extend(dataclasses.replace(image, video=video) for image in found)

    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise VlmFixError(
                f"vision layer {layer} does not exist; the vision tower has layers 0 to {len(blocks) - 1}."
            )
    attns = [getattr(blocks[i], "self_attn", None) or blocks[i].attn for i in layers]
    for i, attn in zip(layers, attns, strict=True):
        yield attn.register_forward_pre_hook(note(i), with_kwargs=True)
    yield tower.register_forward_hook(collect, with_kwargs=True)


def shows_video(found: list[ImageTokens], known: list[ImageTokens], inputs: dict[str, Any]) -> bool:
    """Whether a run of the tower was of the videos: the model runs it for all images first."""
    first, still = found[0].pixels, inputs.get("pixel_values")
    moving = inputs.get("pixel_values_videos")
    if moving is None or still is None or first is None:
        return moving is not None

    def begins(pixels: torch.Tensor) -> bool:
        return pixels[0].numel() == first[0].numel() and torch.equal(pixels[0].to(first).flatten(), first[0].flatten())

    return begins(moving) and (not begins(still) or any(not image.video for image in known))


def in_prompt_order(images: list[ImageTokens], video: torch.Tensor) -> list[ImageTokens]:
    """What the tower saw, images before videos -> as the prompts show it; video [N]: which image tokens are a video's."""
    kinds = {kind: [i for i in images if i.video == kind] for kind in (False, True)}
    if not (kinds[False] and kinds[True]):
        return images
    ordered: list[ImageTokens] = []
    at, moving = 0, video.tolist()
    while at < len(moving) and kinds[moving[at]]:
        ordered.append(kinds[moving[at]].pop(0))
        at += ordered[-1].grid[0] * ordered[-1].grid[1]
    return ordered + kinds[False] + kinds[True]


def views(call: Any) -> list[ImageTokens]:
    """`call.views` in the prompts' order, once each: the tower runs again if it ran once per beam, or not yet."""
    engine, ids = engine_of(call.model), call.inputs["input_ids"]
    shown, packed = ids[torch.isin(ids, engine.tokens.to(ids.device))], packing(call)
    count = len(shown) if packed is None else sum(int(index.max()) // size + 1 for index, size in packed)
    if (sum(image.grid[0] * image.grid[1] for image in call.views) if packed is None else len(call.views)) != count:
        call.views.clear()
        for pixels, features in (("pixel_values", "image"), ("pixel_values_videos", "video")):
            if call.inputs.get(pixels) is not None:
                function = getattr(engine.base, f"get_{features}_features")
                known = inspect.signature(function).parameters
                function(**{k: v for k, v in call.inputs.items() if k in known})
    return in_prompt_order(call.views, shown == video_token_id(call.model))


def packing(call: Any) -> list[tuple[torch.Tensor, int]] | None:
    """`anyres_index` of each image and the patches of a crop, where the model cuts images into crops."""
    engine = engine_of(call.model)
    if engine.family.cells != "anyres" or "image_sizes" not in call.inputs:
        return None
    return [(index, anyres_side(engine.base) ** 2) for index in anyres_index(engine.base, call.inputs)]


def shown_tokens(call: Any, images: list[ImageTokens], name: str) -> torch.Tensor:
    """[N] which of the tokens of `views(call)`, one after the other, each image token of the prompts shows; -1: a newline.

    Raises VlmFixError, for the method `name`, where an image token shows none of them.
    """
    engine, ids, packed = engine_of(call.model), call.inputs["input_ids"], packing(call)
    made = [image.grid[0] * image.grid[1] for image in images]
    found, start = [torch.arange(sum(made))] if packed is None else [], 0
    for index, size in packed or ():
        found.append(torch.where(index < 0, index, index + start))
        start += (int(index.max()) // size + 1) * size
    places = torch.cat(found) if found else torch.zeros(0, dtype=torch.long)
    count = int(torch.isin(ids, engine.tokens.to(ids.device)).sum())
    if len(places) != count or start not in (0, sum(made)) or bool((places == -2).any()):
        raise VlmFixError(
            f"{name}: the prompt holds {count} image tokens, of which the vision tower's {sum(made)} are not to be told: pass "
            "the processor's whole output for images, no video, and none so large that its features are resized."
        )
    return places
