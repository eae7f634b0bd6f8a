"""MARINE, image-grounded guidance (Zhao et al., ICML 2025)."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from vlm_fix import Contrast, VlmFixError, param
from vlm_fix.call import Call
from vlm_fix.decoding.step import checksum, images_of_rows
from vlm_fix.families import image_token_ids
from vlm_fix.method import Method
from vlm_fix.wing import installed

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
        find, size = self.objects if callable(self.objects) else _reader(str(self.objects)), vocabulary(call)
        images = torch.tensor(image_token_ids(call.model, call.family)).tolist()
        rows = []
        for shown in images_of_rows(call):
            found = list(dict.fromkeys(o for image in shown for o in named(find(image))))
            words, ids = [o for o in found if isinstance(o, str)], tuple(o for o in found if not isinstance(o, str))
            if words and ids:
                raise VlmFixError("marine: objects must be names or token ids, not both.")
            line = ids or (self.line(call, words) if words else ())
            if wrong := [i for i in line if not 0 <= i < size or i in images]:
                why = "stands for an image" if wrong[0] in images else f"is none of the model's {size}"
                raise VlmFixError(f"marine: the token id {wrong[0]} of the objects {why}; give others.")
            rows.append(line)
        if not any(rows) and (engine := installed(call.model)) is not None:
            engine.warn_once([self], "no object was found in any image of it.")
        return after_image(call, *rows)

    def line(self, call: Call, words: list[str]) -> tuple[int, ...]:
        told = " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])}, and {words[-1]}"
        instead = "objects as token ids, those of the whole line"
        return line_tokens(call.model, self.prompt.replace("{objects}", told), self.name, instead)

    def combine(self, l: torch.Tensor, l_neg: torch.Tensor) -> torch.Tensor:
        return (l + self.gamma * (l_neg - l)).masked_fill(torch.isinf(l), -torch.inf)


def image_keys(call: Call) -> list[list[str]]:
    """The keys of each prompt's images in a file of objects: checksums of their pixels, as the processor made them."""
    return [[f"{checksum(image):08x}" for image in images] for images in images_of_rows(call)]


def vocabulary(call: Call) -> int:
    """The number of token ids that a call's model can read."""
    return int(call.model.get_input_embeddings().weight.shape[0])


def named(found: Any, where: str = "the function") -> Objects:
    """What a detector says of an image, checked: names that are not empty, or whole token ids, in an order of its own."""
    if isinstance(found, torch.Tensor) or type(found).__module__ == "numpy":
        found = found.tolist()
    if not isinstance(found, list | tuple):
        raise VlmFixError(
            f"marine: {where} gives {found!r} for an image's objects; give a list of names or token ids, such as ['dog'], in the "
            "order in which they are told; [] for none."
        )
    found = [o if isinstance(o, str | bool) or not hasattr(o, "__index__") else operator.index(o) for o in found]
    wrong = [
        o
        for o in found
        if isinstance(o, bool) or not isinstance(o, str | int) or (isinstance(o, str) and not o.strip())
    ]
    if wrong:
        raise VlmFixError(
            f"marine: {where} gives {wrong[0]!r} as an object; a name is a text, a token id a whole number."
        )
    return found


def _reader(path: str) -> Callable[[torch.Tensor], Objects]:
    try:
        known = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise VlmFixError(f"marine: {path} cannot be read as JSON ({problem}).") from problem
    lists = known.values() if isinstance(known, dict) else [None]
    if not all(isinstance(v, list) for v in lists):
        raise VlmFixError(f"marine: {path} must hold one object {{key: [name, ...]}}.")
    for v in lists:
        named(v, path)

    def find(image: torch.Tensor) -> Objects:
        key = f"{checksum(image):08x}"
        if key not in known and "*" not in known:
            raise VlmFixError(f'marine: {path} has no objects of the image {key}, and no "*" for all others.')
        objects: Objects = known[key if key in known else "*"]
        return objects

    return find
