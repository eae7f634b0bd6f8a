"""Image features of several depths (DeepStack), which Qwen3-VL adds to the image columns after its first layers.

What is pruned of a prompt goes from each of them. A merged token keeps its own deeper features: the pruners that merge are
defined on the projected ones alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vlm_fix.session import PAD, Session, View
from vlm_fix.wing import Host

NAMES = ("visual_pos_masks", "deepstack_visual_embeds")


@dataclass
class DeepFeatures:
    """A session part while a prompt is read: what is still to be added, in the session's columns."""

    shown: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))  # [B, L]
    features: list[torch.Tensor] = field(default_factory=list)  # by layer: [N, C], for the N columns shown, row by row


def depths(host: Host) -> int:
    """After how many layers of the language model image features are added."""
    return len(getattr(host.model.config.vision_config, "deepstack_visual_indexes", None) or ())


def kept(kwargs: dict[str, Any], keep: torch.Tensor, index: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """The language model's inputs for the columns `index` [B, n] (mask: not padding) of a prompt, of which `keep` [B, L] stay."""
    shown, features = (kwargs.get(name) for name in NAMES)
    if shown is None or features is None:
        return {}
    here, left = shown.gather(1, index.to(shown.device)) & mask.to(shown.device), keep.to(shown.device)[shown]
    return dict(zip(NAMES, (here, [x[left.to(x.device)] for x in features]), strict=True))


def take(session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The language model's inputs without its deeper features, which `add` adds from now on."""
    shown, features = (kwargs.get(name) for name in NAMES)
    if shown is None or features is None:
        return kwargs
    session.parts[DeepFeatures] = DeepFeatures(shown, list(features))
    return {k: v for k, v in kwargs.items() if k not in NAMES}


def add(session: Session, layer: int, x: torch.Tensor) -> torch.Tensor:
    """What enters `layer` [B, n, C], with the features that belong after the layer before it."""
    deep = session.part(DeepFeatures)
    if session.start or not 0 < layer <= len(deep.features):
        return x
    shown, features = deep.shown.to(x.device), deep.features[layer - 1].to(x)
    view = session.at(layer)
    if isinstance(view, View):
        index = view.index.to(x.device)
        here = shown.gather(1, index) & (view.types.to(x.device) != PAD)
        features = features[torch.zeros_like(shown).scatter_(1, index, here)[shown]]
        shown = here
    if layer == len(deep.features):
        del session.parts[DeepFeatures]
    x = x.clone()
    x[shown] += features
    return x
