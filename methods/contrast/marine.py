"""MARINE, image-grounded guidance (Zhao et al., ICML 2025)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from vlm_fix import Contrast, VlmFixError, param
from vlm_fix.call import Call
from vlm_fix.decoding.step import checksum, images_of_rows
from vlm_fix.method import Method

from .icd import after_image, line_tokens

Objects = Sequence[str] | Sequence[int]


@dataclass(frozen=True)
class Marine(Contrast):
    """Guides the answer towards that to a prompt which names the objects that a detector found in the image.

    z = log p + gamma (log p' - log p); p' sees `prompt`, on a line of its own, between the (last) image and the user's text,
    with the objects as "a", "a and b" or "a, b, and c" in place of {objects}. No object: the prompt stays as it is.

    The objects are yours, no detector comes with this. `objects` is a function of an image's pixels, as generate gets them,
    which returns their names (or token ids of the whole line); or the path of a JSON file {key: [name, ...]}, where
    `image_keys` makes the keys of a call's images, and "*" stands for all that are not in it. The objects of several images
    of a prompt are joined.

    Source: arXiv 2402.08680; official code Linxi-ZHAO/MARINE@13b91b9 (gamma .7; DETR above .95 and RAM++ above .68, joined;
    the first of its four templates for captions). Deviations: the official template ends in the question, in lower case; here
    the user's text follows unchanged. Its guidance follows generate's own processors; here it comes before them.
    """

    name: ClassVar[str] = "marine"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.08680"

    gamma: float = param(0.7, "weight of the prompt with the objects; 1 = only that", low=0)
    objects: str | Callable[[torch.Tensor], Objects] | None = param(
        None, "JSON file of each image's objects, or a function"
    )
    prompt: str = param("This image contains {objects}. Based on this,", "how they are told")

    @property
    def neutral(self) -> bool:
        return self.gamma == 0

    def resolve(self, arch: Any) -> Method:
        if self.gamma and not (callable(self.objects) or (isinstance(self.objects, str) and self.objects.strip())):
            raise VlmFixError(
                "marine names what a detector of yours found: give marine:objects=FILE, a JSON file {key: [name, ...]}, or in "
                "Python a function from an image's pixels to its objects."
            )
        if "{objects}" not in self.prompt:
            raise VlmFixError(f"marine: prompt={self.prompt!r} has no {{objects}} in it.")
        return super().resolve(arch)

    def negative(self, call: Call) -> dict[str, torch.Tensor]:
        find = self.objects if callable(self.objects) else _reader(str(self.objects))
        rows = []
        for images in images_of_rows(call):
            found = list(dict.fromkeys(o for image in images for o in find(image)))
            words, ids = (
                [o for o in found if isinstance(o, str)],
                tuple(int(o) for o in found if not isinstance(o, str)),
            )
            if words and ids:
                raise VlmFixError("marine: objects must be names or token ids, not both.")
            rows.append(ids or (self.line(call, words) if words else ()))
        return after_image(call, *rows)

    def line(self, call: Call, words: list[str]) -> tuple[int, ...]:
        told = " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])}, and {words[-1]}"
        return line_tokens(call.model, self.prompt.replace("{objects}", told), self.name)

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        return (l + self.gamma * (l_neg - l)).masked_fill(torch.isinf(l), -torch.inf)


def image_keys(call: Call) -> list[list[str]]:
    """The keys of each prompt's images in a file of objects: checksums of their pixels, as the processor made them."""
    return [[f"{checksum(image):08x}" for image in images] for images in images_of_rows(call)]


def _reader(path: str) -> Callable[[torch.Tensor], Objects]:
    try:
        known = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise VlmFixError(f"marine: {path} cannot be read as JSON ({problem}).") from problem
    lists = known.values() if isinstance(known, dict) else [None]
    if not all(isinstance(v, list) and all(isinstance(name, str | int) for name in v) for v in lists):
        raise VlmFixError(f"marine: {path} must hold one object {{key: [name, ...]}}.")

    def find(image: torch.Tensor) -> Objects:
        key = f"{checksum(image):08x}"
        if key not in known and "*" not in known:
            raise VlmFixError(f'marine: {path} has no objects of the image {key}, and no "*" for all others.')
        objects: Objects = known[key if key in known else "*"]
        return objects

    return find
