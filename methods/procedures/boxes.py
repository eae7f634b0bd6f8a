"""Boxes that a model writes, and their fusion."""

from __future__ import annotations

import re
from typing import Any

import torch

from vlm_fix.words import tokenizer_of

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the image
NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
FOUR = re.compile(r"[\[(]" + ",".join([NUMBER] * 4) + r"[\])]")


def written(text: str, scale: tuple[float, float]) -> list[Box]:
    """The boxes in a text, as [left, top, right, bottom] in brackets of either kind, in units of 1 / scale of (width, height)."""
    found = []
    for four in FOUR.findall(text):
        x0, y0, x1, y1 = (min(max(float(v) / s, 0.0), 1.0) for v, s in zip(four, (*scale, *scale), strict=True))
        if x1 > x0 and y1 > y0:
            found.append((x0, y0, x1, y1))
    return found


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0.0) * max(h, 0.0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def fused(answers: list[list[Box]], threshold: float) -> list[tuple[float, Box]]:
    """Weighted box fusion (Solovyev et al., 2021) of n answers whose boxes count alike: (confidence, box), surest first.

    A box joins the cluster whose mean it overlaps most, if by more than `threshold`, or begins one. The confidence of a
    cluster of T boxes is min(T, n) / n.
    """
    clusters = list[list[Box]]()
    means = list[Box]()
    for box in (box for boxes in answers for box in boxes):
        best = max(range(len(means)), key=lambda i: overlap(means[i], box), default=-1)
        if best < 0 or overlap(means[best], box) <= threshold:
            clusters.append([])
            means.append(box)
            best = len(means) - 1
        clusters[best].append(box)
        x0, y0, x1, y1 = (sum(side) / len(clusters[best]) for side in zip(*clusters[best], strict=True))
        means[best] = (x0, y0, x1, y1)
    sure = [min(len(cluster), len(answers)) / len(answers) for cluster in clusters]
    order = sorted(range(len(means)), key=lambda i: -sure[i])
    return [(sure[i], means[i]) for i in order]


def tokenized(model: Any, text: str) -> tuple[int, ...]:
    """The ids of a text as a line."""
    ids = tokenizer_of(model.config.name_or_path, "sparc asks in words, which need")(
        f"\n{text.strip()}\n", add_special_tokens=False
    )
    return tuple(ids["input_ids"])


def text_of(model: Any, ids: torch.Tensor) -> str:
    """The text of an answer."""
    tokenizer = tokenizer_of(model.config.name_or_path, "sparc asks in words, which need")
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
