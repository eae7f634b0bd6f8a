"""The input of CHAIR: caption files, and which of COCO's 80 objects are in each image.

Source: shikiw/OPERA@61426ef chair.py (variant nltk) and LisaAnne/Hallucination@6e4d33c utils/chair.py (pattern): the
objects of an image are the categories of its instances and those that its five reference captions mention.

Worked example: an image with the instance "dog" and the reference caption "A puppy beside two cats" has dog and cat.
>>> instances = {"categories": [{"id": 1, "name": "dog"}], "images": [{"id": 7}],
...              "annotations": [{"image_id": 7, "category_id": 1}]}
>>> captions = {"images": [], "annotations": [{"image_id": 7, "caption": "A puppy beside two cats"}]}
>>> sorted(build_ground_truth(instances, captions, "pattern")[7])
['cat', 'dog']
"""

import json
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import DATA, read_text
from vlm_fix.eval.scorers.answers import USUAL, Keys, Tell, read
from vlm_fix.eval.scorers.choices import Variant, one_of

from .score import Caption
from .words import caption_to_words, nodes

CAPTION = '{"image_id": 310196, "caption": "A man on a snowboard."}'


def load_captions(
    path: str | Path,
    keys: Keys = USUAL,
    tell: Tell = str,
) -> list[Caption]:
    """Read captions; `answers.py` says what rows may be. One that failed (null) is left out: an empty
    caption has no hallucination, so that a run would seem better for failing.

    Image ids are numbers or COCO's names, such as COCO_val2014_000000000123.jpg. Warns of images with several captions.
    """
    given = read(path, CAPTION, keys, images=True, what="caption file")
    tell(given.told("are left out"))
    captions = [Caption(int(row.id), row.reply) for row in given.rows if row.reply is not None]
    if not captions:
        raise VlmFixError(f"{path} has no captions: all {len(given.rows)} are null; generate them again.")
    twice = [image for image, times in Counter(caption.image_id for caption in captions).items() if times > 1]
    if twice:
        which = f"image {twice[0]}" if len(twice) == 1 else f"{len(twice)} images, the first of which is {twice[0]}"
        text = f"{path} has several captions of {which}; each of them counts."
        warnings.warn(text, stacklevel=2)
    return captions


def whole_sentences(text: str) -> str:
    """Cut a caption after its last full stop, question mark or exclamation mark: drops a truncated last sentence.

    A caption without any of them is returned as it is, so that it still names its objects.

    >>> whole_sentences("A dog on a sofa. It looks at a ca")
    'A dog on a sofa.'
    """
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$|[\"')])", text)]
    return text[: ends[-1]] if ends else text


def ground_truth(source: str | Path = "coco", variant: Variant = "nltk") -> dict[int, frozenset[str]]:
    """Return image id -> objects, from the package or a JSON file {"image id": ["object", ...]}, gzipped or not.

    "coco" is the map in the package, of the 123,287 images of train and val 2014, which include those of 2017.
    """
    one_of(variant, Variant, "variant")
    path = DATA / f"chair/gt_objects_{variant}_trainval2014.json.gz" if source == "coco" else source
    try:
        found = json.loads(read_text(path, "ground truth"))
        if not all(isinstance(nodes, list) for nodes in found.values()):
            raise TypeError("a text would be read as its letters")
        return {int(image): frozenset(nodes) for image, nodes in found.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        if isinstance(error, VlmFixError):
            raise
        raise VlmFixError(f'The ground truth {path} is not of the form {{"image id": ["object", ...]}}.') from None


def build_ground_truth(instances: Any, captions: Any, variant: Variant = "nltk") -> dict[int, frozenset[str]]:
    """Build the same map from COCO-format instances and captions (dictionaries or pycocotools COCO objects).

    Raises VlmFixError for a category that is neither one of COCO's 80 nor in the synonym list, as no caption could match
    it.
    """
    boxes, references = (getattr(data, "dataset", data) for data in (instances, captions))
    strange = [category["name"] for category in boxes["categories"] if category["name"] not in nodes()]
    if strange:
        raise VlmFixError(
            f"CHAIR knows COCO's 80 objects and their synonyms, not the category {strange[0]!r}; rename it."
        )
    node = {category["id"]: nodes()[category["name"]] for category in boxes["categories"]}
    truth: dict[int, set[str]] = {image["id"]: set() for image in [*boxes["images"], *references["images"]]}
    for annotation in boxes["annotations"]:
        truth[annotation["image_id"]].add(node[annotation["category_id"]])
    for annotation in references["annotations"]:
        truth[annotation["image_id"]].update(caption_to_words(annotation["caption"], variant).node_words)
    return {image: frozenset(nodes) for image, nodes in truth.items()}
