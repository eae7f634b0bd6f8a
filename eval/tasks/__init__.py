"""What `vlm-fix eval` asks, a builder beside each benchmark.

    benchmark    data                          what is asked
    pope, chair  picto, picto:SPLIT, coco:DIR  see `pope.py` and `chair.py`; `coco.py` says what DIR holds
    amber        picto, amber:DIR              captions ("amber") and yes/no questions ("amber-qa")
    mme          mme:DIR                       the questions of DIR, MME_Benchmark_release_version
    hallusion    hallusion:DIR                 the 951 questions about figures

`sample.py` says what a task has; `layouts.py` how a benchmark is compared and shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto

from . import amber, chair, coco, hallusion, mme, pope
from .sample import IMAGES, Items

if TYPE_CHECKING:
    from vlm_fix.eval.run.runner import Settings

Task: TypeAlias = pope.Pope | chair.Chair | Items
SUITE = {"amber": amber, "mme": mme, "hallusion": hallusion}


def build(settings: Settings) -> list[Task]:
    """The tasks that the settings ask for; every missing file is reported here, before a model is loaded. Raises
    VlmFixError for data of another benchmark, missing images or a bad prompt."""
    name, (kind, _, where) = settings.benchmark, settings.data.partition(":")
    folder = Path(where).expanduser()
    if name not in ("all", "chair", "amber") and settings.prompt and "{question}" not in settings.prompt:
        known = {"pope": "POPE", "mme": "MME", "hallusion": "HallusionBench"}[name]
        raise VlmFixError(
            f'--prompt for {known} must hold {{question}}, for example "{{question}} Please answer in one word."'
        )
    if name in SUITE:
        return [*_suite(name, kind, where, settings)]
    unknown = [split for split in settings.splits if split not in pope.SPLITS]
    if unknown or not settings.splits:
        raise VlmFixError(f"--split {','.join(unknown)!r} is unknown: choose from {', '.join(pope.SPLITS)}.")
    if settings.questions:
        if kind != "coco" or not where or name != "pope":
            raise VlmFixError("--questions needs --data coco:DIR with the images, and is for pope alone.")
        return [pope.of_files(folder, settings)]
    made: dict[str, Any]
    if kind == "picto":
        n = settings.limit or IMAGES
        # POPE leaves out scenes with fewer than three kinds of objects, so it looks at more of them
        scenes = picto.scenes(where or "shift", n + n // 2 + 8, settings.seed)
        source = f"picto:{where or 'shift'}, {n} scenes, seed {settings.seed}"
        made = {
            "pope": lambda: pope.of_picto(scenes, n, source, settings),
            "chair": lambda: chair.of_picto(scenes[:n], source, settings),
        }
    elif kind == "coco" and where:
        images = coco.Folder.open(folder)
        made = {"pope": lambda: pope.of_folder(images, settings), "chair": lambda: chair.of_folder(images, settings)}
    else:
        raise VlmFixError(f"--data {settings.data!r} is unknown: give picto, picto:SPLIT or coco:DIR.")
    return [made[each]() for each in (("pope", "chair") if name == "all" else (name,))]


def _suite(name: str, kind: str, where: str, settings: Settings) -> list[Items]:
    if name == "amber" and kind == "picto":
        return amber.of_picto(where or "shift", settings)
    if kind != name or not where:
        raise VlmFixError(
            f"eval {name} reads --data {name}:DIR, not {settings.data!r}: give the folder of its images, "
            f"{SUITE[name].IMAGES_FROM}{', or picto' if name == 'amber' else ''}."
        )
    return SUITE[name].build(Path(where).expanduser(), settings)
