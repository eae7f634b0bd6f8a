"""What a method may know of a model: its family and its sizes. Plain data, at the bottom of everything."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Attribute paths are relative to the `...ForConditionalGeneration` model.

    `base` owns get_placeholder_mask and the text model ("": the model itself), `head` is the language head; `encoder` names
    the way encoder attention is recomputed (pruning/encoder.py), None: pruners are refused; `cells` how image tokens lie in
    the image (see `image_cells`), "none": a resampler makes them; a model type may name the tower it is meant for
    ("llava+pixtral"); `mrope` families have 3-D positions made by `base.get_rope_index`; others count positions from
    `first_position`. Where the prompt is not `causal`, all its rows see its last one. `crosses`: layers of their own read the
    images through cross-attention, so that no column of self-attention shows one.
    """

    name: str
    model_types: tuple[str, ...]
    base: str = "model"
    language: str = "model.language_model"
    head: str = "lm_head"
    vision: str = "model.vision_tower"
    encoder: str | None = None
    image_tokens: tuple[str, ...] = ("image_token_id",)
    mrope: bool = False
    first_position: int = 0
    causal: bool = True
    crosses: bool = False
    cells: str = "tiles"


@dataclass(frozen=True)
class Arch:
    """Sizes of one model, from which methods take their defaults."""

    family: Family
    depth: int
    hidden: int
    heads: int
    vocab: int
    text_type: str
    vision_depth: int
    vision_last: int  # index of the last vision layer whose output reaches the projector
    vision_full: tuple[int, ...]  # vision layers with full (not windowed) attention
    attention: tuple[int, ...]  # language-model layers with softmax attention; a hybrid decoder's others have none
