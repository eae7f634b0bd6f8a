"""Tasks: the images and prompts that `vlm-fix eval` asks, one module per benchmark.

    benchmark    data                          tasks
    pope, chair  picto, picto:SPLIT, coco:DIR  see `pope.py` and `chair.py`; `coco.py` says what DIR holds
    amber        picto, amber:DIR              captions ("amber") and yes/no questions ("amber-qa")
    mme          mme:DIR                       the questions of DIR, MME_Benchmark_release_version
    hallusion    hallusion:DIR                 the 951 questions about figures
    dash-b, beaf, reefknot                     NAME:DIR, the folder of their question files and images: `listed.py`

`sample.py` says what a task consists of; `scorers/` judges its answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto
from vlm_fix.eval.files import counted
from vlm_fix.eval.scorers.benchmark import Captions
from vlm_fix.eval.scorers.registry import BENCHMARKS
from vlm_fix.eval.settings import Settings

from . import amber, chair, coco, hallusion, listed, mme, pairs, pope
from .sample import IMAGES, Items, Sample, load_image

__all__ = ["Items", "Sample", "Task", "build", "load_image", "pairs"]

Task: TypeAlias = pope.Pope | chair.Chair | Items
OWN_IMAGES: dict[str, Any] = {
    "amber": amber,
    "mme": mme,
    "hallusion": hallusion,
    "dash-b": listed.DashB,
    "beaf": listed.Beaf,
    "reefknot": listed.Reefknot,
}
"""Benchmarks with a folder of images of their own; POPE and CHAIR ask about any."""


def build(settings: Settings) -> list[Task]:
    """Build the tasks that the settings ask for, before a model is loaded.

    Raises VlmFixError for data of another benchmark, missing files or a bad prompt.
    """
    name, (kind, _, where) = settings.benchmark, settings.data.partition(":")
    folder = Path(where).expanduser()
    made = BENCHMARKS.get(name)
    if name != "all" and not (made and made.asked):
        known = ", ".join(["all", *(each.name for each in BENCHMARKS.values() if each.asked)])
        raise VlmFixError(f"there is no benchmark {name!r} to ask a model: choose from {known}.")
    questions_only = made and all(not isinstance(layout.answers, Captions) for layout in made.layouts.values())
    if made and questions_only and settings.prompt and "{question}" not in settings.prompt:
        raise VlmFixError(
            f'--prompt for {made.title} must hold {{question}}, for example "{{question}} Please answer in one word."'
        )
    if settings.labels != "both" and name not in ("pope", "all"):
        raise VlmFixError(f"--labels has no effect on {name}: it is for pope.")
    if name in OWN_IMAGES:
        return [*_own_images(name, kind, where, settings)]
    unknown = [split for split in settings.splits if split not in pope.SPLITS]
    if unknown or not settings.splits:
        raise VlmFixError(f"--split {','.join(unknown)!r} is unknown: choose from {', '.join(pope.SPLITS)}.")
    if settings.questions:
        if kind != "coco" or not where or name != "pope":
            raise VlmFixError("--questions needs --data coco:DIR with the images, and is for pope alone.")
        return [pope.of_files(folder, settings)]
    builders: dict[str, Any]
    if kind == "picto":
        n = settings.limit or IMAGES
        # more scenes for POPE, which skips those with fewer than three kinds of objects
        scenes = picto.scenes(where or "shift", n + n // 2 + 8, settings.seed)
        source = f"picto:{where or 'shift'}, {counted(n, 'scene')}, seed {settings.seed}"
        builders = {
            "pope": lambda: pope.of_picto(scenes, n, source, settings),
            "chair": lambda: chair.of_picto(scenes[:n], source, settings),
        }
    elif kind == "coco" and where:
        images = coco.Folder.open(folder)
        builders = {
            "pope": lambda: pope.of_folder(images, settings),
            "chair": lambda: chair.of_folder(images, settings),
        }
    else:
        raise VlmFixError(f"--data {settings.data!r} is unknown: give picto, picto:SPLIT or coco:DIR.")
    return [builders[each]() for each in (("pope", "chair") if name == "all" else (name,))]


def _own_images(name: str, kind: str, where: str, settings: Settings) -> list[Items]:
    if name == "amber" and kind == "picto":
        return amber.of_picto(where or "shift", settings)
    if kind != name or not where:
        raise VlmFixError(
            f"eval {name} reads --data {name}:DIR, not {settings.data!r}: give the folder of its images, "
            f"{OWN_IMAGES[name].IMAGES_FROM}{', or picto' if name == 'amber' else ''}."
        )
    return OWN_IMAGES[name].build(Path(where).expanduser(), settings)
