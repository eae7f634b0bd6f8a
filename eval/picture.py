"""One image, asked with and without methods: what `vlm-fix describe` prints and the picture of the README shows."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

import vlm_fix
from vlm_fix.calibrated import check_named, read_all
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto
from vlm_fix.eval.run import generation, loading
from vlm_fix.eval.scorers.chair import data, score, words
from vlm_fix.eval.settings import Settings
from vlm_fix.eval.tasks.sample import CAPTION_PROMPT
from vlm_fix.images import read_image
from vlm_fix.registry import parse

Mark = tuple[int, int, str, bool | None]  # start and end in the text, the object, whether it is in the image


class Shown(NamedTuple):
    """An image and the COCO objects in it; None where that is not known."""

    image: Image.Image
    truth: frozenset[str] | None


class Answer(NamedTuple):
    """What one stack of methods answered. notes: what it warned of."""

    method: str
    text: str
    tokens: int
    seconds: float
    notes: list[str]

    def marks(self, truth: Collection[str] | None) -> list[Mark]:
        """The objects that the text names, as CHAIR's pattern variant reads it, in their order."""
        (found,) = score.score([score.Caption(0, self.text)], {0: truth or ()}, "pattern").captions
        right = [(o.start, o.end, o.node, None if truth is None else True) for o in found.correct]
        wrong = [(o.start, o.end, o.node, None if truth is None else False) for o in found.hallucinated]
        return sorted([*right, *wrong], key=lambda mark: mark[:2])

    def objects(self, truth: Collection[str] | None) -> dict[str, bool | None]:
        """Object -> whether it is in the image."""
        return {name: right for _, _, name, right in self.marks(truth)}


def find(name: str, objects: str | None = None, split: str = "test") -> Shown:
    """The image of a file, or a scene of Picto's ("scene:0"). objects "dog,sports ball": what is in it.

    Raises VlmFixError for an image that cannot be read, and for an object that is none of COCO's.
    """
    told = None if objects is None else objects_of(objects)
    kind, _, number = name.partition(":")
    if kind == "scene" and number.isdigit():
        drawn = picto.scene(split, 0, int(number))
        truth = data.build_ground_truth(*picto.coco_annotations([drawn]), "pattern")[drawn.image_id]
        return Shown(drawn.image, frozenset(truth) if told is None else told)
    image = read_image(name)
    known = re.fullmatch(r"COCO_(?:val|train)\d{4}_(\d{12})", Path(name).stem)
    if told is None and known:
        told = data.ground_truth("coco", "pattern").get(int(known[1]))
    return Shown(image, None if told is None else frozenset(told))


def objects_of(objects: str) -> frozenset[str]:
    """ "dog,sports ball" -> the objects; VlmFixError for what is none of COCO's."""
    found = set()
    for word in filter(None, (part.strip() for part in objects.split(","))):
        named = {each.node for each in words.find_objects(word, "pattern")[1]}
        if not named:
            raise VlmFixError(
                f"--objects: {word!r} is none of COCO's 80 objects, which alone are coloured; leave it out."
            )
        found |= named
    return frozenset(found)


def ask(
    image: Image.Image,
    prompt: str | None,
    stacks: Sequence[Sequence[Any]],
    model: str | tuple[Any, Any] = "picto-llava",
    dtype: str = "auto",
    device: str = "auto",
    max_new_tokens: int = 128,
    calibration: Sequence[Any] = (),
    seed: int = 0,
) -> Iterator[Answer]:
    """Answer with each stack in turn, greedily. model: a name, or (model, processor).

    Raises VlmFixError for a model that cannot be loaded or a method that it refuses, before the first answer.
    """
    how, files = Settings(max_new_tokens=max_new_tokens).generate_kwargs(max_new_tokens), read_all(tuple(calibration))
    check_named(files, list(dict.fromkeys(method.name for stack in stacks for method in parse(list(stack)))))
    net, processor = loading.load_model(model, dtype, device)[:2] if isinstance(model, str) else model
    plain = [all(method.name == "baseline" for method in parse(list(stack))) for stack in stacks]

    def on(stack: Sequence[Any], bare: bool) -> Any:
        names = {method.name for method in parse(list(stack))}
        chosen = [file for file in files if file.method in names]
        return contextlib.nullcontext() if bare else vlm_fix.wrapped(net, list(stack), chosen)

    for stack, bare in zip(stacks, plain, strict=True):
        with on(stack, bare):
            pass
    for stack, bare in zip(stacks, plain, strict=True):
        with on(stack, bare), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            batch = generation.generate(net, processor, [image], [prompt or CAPTION_PROMPT], seed, **how)
        notes = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
        notes += [] if batch.finished[0] else [f"Cut off after {max_new_tokens} tokens."]
        name = "+".join(method.spec() for method in parse(list(stack)))
        yield Answer(name, batch.texts[0], batch.tokens[0], batch.seconds, notes)
