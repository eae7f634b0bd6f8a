"""Plugin for lmms-eval (0.7.3): its model classes with a method applied, and POPE as its authors score it.

    lmms-eval --model vlm_fix_llava_hf --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=pai \\
              --tasks pope_official --include_path $(vlm-fix lmms-tasks)

lmms-eval's own task `pope` accepts only "yes" or "no" and computes the yes-ratio from the labels. `pope_official` asks the
same questions, without further instructions, and uses POPE's official scorer. `write_tasks` makes such tasks from local
images, with the questions of `vlm-fix eval pope`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_fix.eval.files import DATA, write_atomic
from vlm_fix.eval.scorers import yesno
from vlm_fix.eval.scorers.pope import score as pope
from vlm_fix.eval.settings import Settings
from vlm_fix.eval.tasks import build
from vlm_fix.eval.tasks.pope import Pope
from vlm_fix.images import read_image

TASKS = DATA / "lmms"
METRICS = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1_score": "f1",
    "yes_ratio": "yes_ratio",
}


def models() -> list[Any]:
    """Return the models for the entry point `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    from . import lmms_models

    return [
        ModelManifest(model_id=f"vlm_fix_{name}", chat_class_path=f"{lmms_models.__name__}.VlmFix{base}")
        for name, base in lmms_models.CHAT.items()
    ]


def pope_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Return the question's image; local tasks have its path."""
    image = doc["image"]
    return [read_image(image, upright=False) if isinstance(image, str) else image.convert("RGB")]


def pope_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """Return the question, between the pre_prompt and post_prompt of the task."""
    around = lmms_eval_specific_kwargs or {}
    return f"{around.get('pre_prompt', '')}{doc['question'].strip()}{around.get('post_prompt', '')}"


def pope_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return one row per metric, with the keys of lmms-eval's own POPE task."""
    label = doc["answer"].lower().strip()
    said = yesno.verdict(results[0], label, "official")
    row = {"question_id": doc["question_id"], "prediction": results[0], "ground_truth": label}
    scored = row | {"score": float(said == label)}  # lmms-eval prints the standard error of "score" with the metric
    return {f"pope_{name}": scored if name == "accuracy" else row for name in METRICS}


def _figure(name: str, rows: Sequence[Mapping[str, Any]]) -> float:
    questions = [pope.Question(i, "", "", row["ground_truth"]) for i, row in enumerate(rows)]
    answers = [pope.Answer(i, row["prediction"]) for i, row in enumerate(rows)]
    return float(getattr(pope.score(questions, answers, "official"), METRICS[name]))


def pope_accuracy(rows: Sequence[Mapping[str, Any]]) -> float:
    """Fraction of right answers."""
    return _figure("accuracy", rows)


def pope_precision(rows: Sequence[Mapping[str, Any]]) -> float:
    """Fraction of "yes" answers that are right."""
    return _figure("precision", rows)


def pope_recall(rows: Sequence[Mapping[str, Any]]) -> float:
    """Fraction of present objects that were answered "yes"."""
    return _figure("recall", rows)


def pope_f1_score(rows: Sequence[Mapping[str, Any]]) -> float:
    """Harmonic mean of precision and recall."""
    return _figure("f1_score", rows)


def pope_yes_ratio(rows: Sequence[Mapping[str, Any]]) -> float:
    """Fraction of "yes" answers."""
    return _figure("yes_ratio", rows)


def write_tasks(folder: str | Path, settings: Settings) -> Path:
    """Write POPE over `settings.data` into `folder` as tasks pope_picto_SPLIT or pope_coco_SPLIT, and their group.

    Questions and images are those of `vlm-fix eval pope` with the same data, limit, seed and splits. Returns the folder,
    for --include_path. Raises VlmFixError for missing data.
    """
    folder = Path(folder).resolve()
    (task,) = build(dataclasses.replace(settings, labels="pope"))
    assert isinstance(task, Pope)
    images: dict[str, str] = {}
    for sample in task.samples:
        if isinstance(sample.image, Path):
            images[sample.file] = str(sample.image.resolve())
        elif sample.file not in images:
            path = folder / "images" / f"{Path(sample.file).stem}.png"  # lossless, as in `vlm-fix eval`
            path.parent.mkdir(parents=True, exist_ok=True)
            sample.image.save(path)
            images[sample.file] = str(path)
    folder.mkdir(parents=True, exist_ok=True)
    group = f"pope_{settings.data.partition(':')[0]}"
    for split, questions in task.questions.items():
        rows = [
            {"question_id": str(q.question_id), "image": images[q.image], "question": q.text, "answer": q.label}
            for q in questions
        ]
        write_atomic(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_atomic(
            folder / f"{group}_{split}.yaml",
            f"include: {json.dumps(str(TASKS / 'pope_template'))}\ntask: {group}_{split}\ndataset_path: json\n"
            f"dataset_kwargs:\n  data_files:\n    test: {split}.jsonl\ntest_split: test\n",
        )
    members = "".join(f"  - {group}_{split}\n" for split in task.questions)
    write_atomic(folder / f"{group}.yaml", f"group: {group}\ntask:\n{members}")
    return folder
