"""Picto: a small world of pictograph scenes with COCO annotations, and a vision-language model trained in it."""

from pathlib import Path

from vlm_fix.errors import VlmFixError

from .world import CATEGORIES, SPLITS, Scene, coco_annotations, render, scene, scenes

__all__ = ["CATEGORIES", "SPLITS", "Scene", "coco_annotations", "model_path", "render", "scene", "scenes"]


def model_path(name: str = "picto-llava") -> Path:
    """The folder of a bundled checkpoint, for ``from_pretrained``.

    "picto-smol" is put together in the cache folder when it is first asked for (see ``smol.path``).
    """
    bundled = {p.parent.name: p.parent for p in sorted(Path(__file__).parent.glob("*/config.json"))}
    if name not in bundled:
        raise VlmFixError(f"no bundled model {name!r}: choose one of {', '.join(bundled) or '(none is installed)'}")
    if name == "picto-smol":
        from . import smol

        return smol.path()
    return bundled[name]
