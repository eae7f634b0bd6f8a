"""A folder of images with COCO annotations.

Images are in DIR, DIR/val2014, DIR/images or DIR/images/val2014; annotations, if any, in DIR/annotations or DIR as
instances_*.json and captions_*.json. The id of an image with a COCO name (000000000042.jpg,
COCO_val2014_000000000042.jpg) is its number; for other names the annotations must give it. VlmFixErrors name what is missing.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import read_text

NAME = re.compile(r"(?:COCO_(?:train|val)20\d\d_)?(\d{12})")


PARTS: dict[str, tuple[tuple[str, type], ...]] = {
    "images": (("id", int), ("file_name", str)),
    "categories": (("id", int), ("name", str)),
    "annotations": (("image_id", int),),
}
OWN: dict[str, tuple[tuple[str, type], ...]] = {"instances": (("category_id", int),), "captions": (("caption", str),)}
"""What entries of an annotation file have at least."""


@dataclasses.dataclass
class Folder:
    """An open folder. `images` maps ids to files; `own` means that they are not COCO's images."""

    path: Path
    images: dict[int, Path]
    own: bool

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Find the images and their ids."""
        paths = paths_in(path)
        coco = {int(match[1]): file for file in paths.values() if (match := NAME.fullmatch(file.stem))}
        if coco:
            return cls(path, coco, False)
        images = _annotations(path, "instances")["images"]
        own = {image["id"]: paths[image["file_name"]] for image in images if image["file_name"] in paths}
        if not own:
            raise VlmFixError(f"no image in {path} is named as its instances_*.json says: mend file_name there.")
        return cls(path, own, True)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {file.name: number for number, file in self.images.items()}

    def number_of(self, name: str) -> int | None:
        """Return the id of an image by file name, also of COCO images that are not in the folder."""
        match = NAME.fullmatch(Path(name).stem)
        return self._numbers.get(name, int(match[1]) if match and not self.own else None)

    def wanted(self, ids: str | None) -> list[int] | None:
        """Read the image ids of --ids: a file with a number or file name per line."""
        if ids is None:
            return None
        path = Path(ids)
        if not path.is_file():
            raise VlmFixError(f"--ids {path} does not exist: give a text file with one image id a line.")
        lines = list(dict.fromkeys(line.strip() for line in read_text(path, "--ids file").split("\n") if line.strip()))
        if not lines:
            raise VlmFixError(f"--ids {path} is empty: give one image id (a number or a file name) a line.")
        numbers = [int(line) if line.isdigit() else self.number_of(line) for line in lines]
        lost = [line for line, number in zip(lines, numbers, strict=True) if number not in self.images]
        if lost:
            raise VlmFixError(
                f"{len(lost)} of {len(lines)} ids in {path} (first {lost[0]}) have no image in {self.path}: add the "
                "files or take the ids out."
            )
        return [number for number in numbers if number is not None]

    def annotations(self, kind: str, ids: Collection[int]) -> dict[str, Any]:
        """Read instances_*.json or captions_*.json, reduced to these images."""
        whole, ids = _annotations(self.path, kind), {*ids}
        images = [image for image in whole["images"] if image["id"] in ids]
        rows = [row for row in whole["annotations"] if row["image_id"] in ids]
        listed = {image["id"] for image in images}
        names = {category["id"] for category in whole.get("categories", ())}
        for row in rows:
            lost = (
                "image_id"
                if row["image_id"] not in listed
                else "category_id"
                if row.get("category_id") not in names
                else ""
            )
            if lost and (kind == "instances" or lost == "image_id"):
                raise VlmFixError(
                    f"{kind}_*.json in {self.path} has an annotation with {lost} {row[lost]}, which it does not list: fetch the "
                    "annotation file again."
                )
        return {**whole, "images": images, "annotations": rows}


def paths_in(folder: Path) -> dict[str, Path]:
    """Return file name -> path of the images of a folder."""
    if not folder.is_dir():
        raise VlmFixError(
            f"{folder} is not a folder: give coco:DIR with val2014 of cocodataset.org in DIR or DIR/val2014."
        )
    paths: dict[str, Path] = {}
    for place in (folder / "val2014", folder / "images" / "val2014", folder / "images", folder):
        for path in sorted(place.glob("*")) if place.is_dir() else []:
            if path.suffix.lower() in {".jpg", ".jpeg", ".png"}:
                paths.setdefault(path.name, path)
    if not paths:
        raise VlmFixError(
            f"{folder} holds no images: put the jpg files of cocodataset.org's val2014.zip there or in {folder / 'val2014'}."
        )
    return paths


def _annotations(folder: Path, kind: str) -> dict[str, Any]:
    places = [folder / "annotations" / f"{kind}_val2014.json"]
    places += [*sorted((folder / "annotations").glob(f"{kind}_*.json")), *sorted(folder.glob(f"{kind}_*.json"))]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise VlmFixError(
            f"{places[0]} is missing: these images are not covered by the questions and ground truth of the package, "
            "so put COCO's annotation file there."
        )
    try:
        found = json.loads(read_text(path, "annotation file"))
    except VlmFixError:
        raise
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise VlmFixError(f"{path} is not JSON{where}: fetch the annotation file again.") from error
    for part, keys in {**PARTS, "annotations": (*PARTS["annotations"], *OWN[kind])}.items():
        rows = found.get(part) if isinstance(found, dict) else None
        if part == "categories" and kind == "captions":
            continue
        for number, row in enumerate(rows if isinstance(rows, list) else [None], 1):
            lost = [key for key, type in keys if not isinstance(row, dict) or not isinstance(row.get(key), type)]
            if lost:
                raise VlmFixError(
                    f'{path}: {part} has no "{lost[0]}" in its entry {number}, as COCO\'s have: fetch the annotation file again.'
                )
    return found
