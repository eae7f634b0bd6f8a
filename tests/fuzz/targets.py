"""The readers, each with what it is fed. A reader returns, or raises VlmFixError in one line; anything else is a fault."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from vlm_fix import registry
from vlm_fix.arch import Arch
from vlm_fix.calibrated import read_all
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import options
from vlm_fix.eval.files import read_rows
from vlm_fix.eval.recommend.ledger import Ledger
from vlm_fix.eval.report import export, page
from vlm_fix.eval.run.store import Store
from vlm_fix.eval.scorers import answers
from vlm_fix.eval.scorers.chair import data as chair_data
from vlm_fix.eval.scorers.pope import data as pope_data
from vlm_fix.eval.scorers.registry import BENCHMARKS
from vlm_fix.eval.tasks import coco, pairs
from vlm_fix.eval.tasks.sample import Sample, load_image
from vlm_fix.families import FAMILIES
from vlm_fix.methods.contrast import marine
from vlm_fix.methods.hidden.files import by_layer, place_of
from vlm_fix.presets import Preset

from .content import ANY_JSON, broken, picture, tables

QUESTION = {
    "question_id": 1,
    "image": "COCO_val2014_000000000042.jpg",
    "text": "Is there a dog in the image?",
    "label": "yes",
}
GOOD = [
    {"question_id": 1, "prompt": "Is there a dog in the image?", "text": "Yes"},
    {"image_id": 42, "caption": "A dog on a sofa."},
    {"id": 1005, "response": "No"},
    {"doc_id": 0, "filtered_resps": ["yes"], "pope_accuracy": {"question_id": "1", "score": 1.0}, "target": "yes"},
    {"index": 0, "question": "Is there a dog in the image?", "answer": "Yes", "prediction": "No", "category": "random"},
    {"img_id": "1.png", "object_name": "bed", "gt": "no", "response": "no"},
    {"category": "existence", "image": "a.jpg", "question": "Is there a dog?", "label": "Yes", "response": "Yes."},
    {
        "image_id": "1",
        "query_prompt": "Is the cup on it?",
        "label": "yes",
        "type": "Yes/No",
        "relation_type": "perception",
        "response": "Yes",
    },
    {"question_id": 1, "p_yes": 0.9, "p_no": 0.05, "yes_tokens": ["Yes"], "no_tokens": ["No"]},
    {
        "run": "a",
        "seed": 0,
        "benchmark": "pope",
        "batch": 0,
        "id": "x",
        "image": "x",
        "prompt": "?",
        "label": "yes",
        "splits": ["random"],
        "p_yes": 0.9,
        "p_no": 0.05,
    },
]
KEPT = [
    {"run": "a", "seed": 0, "benchmark": "pope", "batch": 0, "batch_size": 1, "id": str(i), "answer": "yes"}
    for i in (0, 1)
]
STEPS = [{"a": 1}, {"key": ["pai"], "seconds": 1.5, "value": 3}]
PAIRS = [{"image": "1.jpg", "value": "A dog.", "h_value": "A dog and a cat."}]
INSTANCES = {
    "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)],
    "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
    "annotations": [{"image_id": i, "category_id": c} for i in (1, 2) for c in (1, 2)],
}
PRESET = b"""\
method: "pai:alpha=0.5+vcd"
stack:
- method: pai
  parameters: {alpha: 0.5, layers: [0, 1]}
- method: vti
  parameters: {file: vlm-fix.vti.file.safetensors}
model: {name: m, type: llava, depth: 4, hidden: 64, heads: 4, weights: "sha256:00"}
verdict: better
"""
SMALL = Arch(FAMILIES[0], 2, 8, 2, 16, "llama", 2, 0, (0, 1), (0, 1))
VECTORS = save({f"direction.{i}": torch.ones(8) for i in range(2)})
MATRIX = save({"all": torch.ones(2, 8)})
MANIFEST = {
    "artifact_type": "direction",
    "site": {"stream": "language", "layer": 1, "component": "mlp_out", "io": "output"},
}
CALIBRATION = {"method": "pai", "found": {"alpha": 0.5}, "model": {"name": "m", "depth": 2}}
RESULTS = {
    "runs": {"baseline": {"pope": {"random": {"n": 1, "accuracy": 0.5, "failed": 0, "delta": {}}}}},
    "settings": {
        "model": {"name": "m", "dtype": "float32"},
        "data": {"pope": {"source": "s", "questions": {"random": 1}}},
        "scorer": "official",
        "batch_size": 8,
    },
    "warnings": {},
    "changed": {"baseline": {"answers": 1, "changed": 0}},
    "speed": {"baseline": {"pope": {"tokens_per_second": 1, "first_token_seconds": 1, "peak_mb": 1}}},
    "hardware": "h",
    "peak_memory_of": "p",
}
SPECS = [
    "pai:alpha=0.2,gamma=1.1",
    "var:sink_dims=1415|2533,rho=0.5+vcd",
    "hiprune:keep=32",
    "vcd:alpha=1e400",
    "pai:alpha=nan",
    "opera",
]
YAML = b"benchmark: pope\nmethod: [pai, vcd]\nlimit: 5\ngen-kwargs: {repetition_penalty: 1.1}\n"


@dataclass(frozen=True)
class Target:
    """A reader of the file (or of the text in it) that `strategy` makes; `name` is that of the file."""

    read: Callable[[Path], Any]
    strategy: st.SearchStrategy[bytes]
    name: str = "file"
    slow: bool = False  # for it reads a benchmark's thousands of questions each time


def _score(name: str, *before: str, **given: Any) -> Callable[[Path], Any]:
    names = [a.dest for a in BENCHMARKS[name].arguments if not a.name.startswith("-")][-1 - len(before) :]

    def read(path: Path) -> Any:
        asked = path.with_name("questions.json")
        asked.write_text(json.dumps([QUESTION]))
        places = [str(asked) if place == "QUESTIONS" else place for place in before]
        return BENCHMARKS[name].score_files(**given, **dict(zip(names, [*places, str(path)], strict=True)))

    return read


def _coco(path: Path) -> Any:
    (path.parent / "1.jpg").write_bytes(picture("JPEG"))
    folder = coco.Folder.open(path.parent)
    instances = folder.annotations("instances", folder.images)
    return pope_data.make_questions(instances, "random", images=1, per_image=2), chair_data.build_ground_truth(
        instances, instances
    )


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _pairs(path: Path) -> Any:
    (path.parent / "1.jpg").write_bytes(picture("JPEG"))
    return pairs.of_file(str(path), path.parent, 1, set(), 0)


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def _specs(path: Path) -> Any:
    return [registry.parse(stack) for stack in registry.split_methods(_text(path))]


def _image(path: Path) -> Any:
    return load_image(Sample("a", 1, path.name, path, "?", {}))


def _artifact(path: Path) -> Any:
    (path.parent / "tensors.safetensors").write_bytes(save({"direction": torch.ones(8)}))
    return by_layer(str(path.parent), SMALL, "steer"), place_of(str(path.parent))


def _run(path: Path) -> Any:
    (path.parent / "config.json").write_text("{}")
    return Store(path.parent, {}, resume=True).of("a", "pope")


def _preset(path: Path) -> Any:
    found = Preset.read(path)
    return found.spec, Preset.read(path).about


def _report(path: Path) -> Any:
    found = page.read([path])
    with page.shown(path):
        made = export.csv_text(found), export.latex(found)
    return made, page.page([path], 0), page.leaderboard([path])


ANSWERS = tables(GOOD)
JSON = st.builds(lambda value: json.dumps(value).encode(), ANY_JSON)
TARGETS = {
    "rows": Target(lambda path: read_rows(path, "file"), ANSWERS),
    "answers": Target(lambda path: answers.read(path, "{...}"), ANSWERS),
    "captions": Target(lambda path: answers.read(path, "{...}", images=True, sparse=True), ANSWERS),
    "marks": Target(lambda path: answers.read(path, "{...}", numbers=True), ANSWERS),
    "pope": Target(_score("pope", "QUESTIONS"), ANSWERS),
    "pope of COCO": Target(_score("pope"), ANSWERS, slow=True),
    "chair": Target(_score("chair", variant="pattern"), ANSWERS),
    "amber": Target(_score("amber"), ANSWERS, slow=True),
    "mme": Target(_score("mme"), ANSWERS),
    "hallusion": Target(_score("hallusion"), ANSWERS, slow=True),
    "dash-b": Target(_score("dash-b"), ANSWERS),
    "reefknot": Target(_score("reefknot"), ANSWERS),
    "beaf": Target(lambda path: BENCHMARKS["beaf"].score_files(questions=str(path), answers=str(path)), ANSWERS),
    "fohe": Target(_score("fohe", "QUESTIONS"), ANSWERS),
    "r-bench": Target(_score("r-bench", "QUESTIONS"), ANSWERS),
    "opope": Target(_score("opope", "QUESTIONS"), ANSWERS),
    "pope-prob": Target(_score("pope-prob", "QUESTIONS"), ANSWERS),
    "samples": Target(lambda path: BENCHMARKS["pope-prob"].score_files(questions=None, answers=str(path)), ANSWERS),
    "questions": Target(pope_data.load_questions, tables([QUESTION])),
    "ground truth": Target(lambda path: chair_data.ground_truth(path, "pattern"), JSON | broken([b'{"42": ["dog"]}'])),
    "coco": Target(_coco, broken([json.dumps(INSTANCES).encode()]) | JSON, "instances_val2014.json"),
    "calibration": Target(lambda path: read_all((path,)), broken([json.dumps(CALIBRATION).encode()]) | JSON),
    "recommendation": Target(_preset, broken([PRESET]) | JSON, "vlm-fix.yaml"),
    "vectors": Target(
        lambda path: by_layer(str(path), SMALL, "steer"), broken([VECTORS, MATRIX]), "vectors.safetensors"
    ),
    "artifact": Target(_artifact, broken([json.dumps(MANIFEST).encode()]) | JSON, "manifest.json"),
    "run": Target(_run, broken([_lines(KEPT)]) | tables(KEPT), "samples.jsonl"),
    "search": Target(
        lambda path: Ledger(path, {"a": 1}, resume=True), broken([_lines(STEPS)]) | tables(STEPS), "a.steps.jsonl"
    ),
    "objects": Target(lambda path: marine._reader(str(path)), broken([b'{"*": ["dog"]}']) | JSON),
    "pairs": Target(_pairs, broken([_lines(PAIRS)]) | tables(PAIRS)),
    "config": Target(options.read_file, broken([YAML]) | JSON),
    "results": Target(_report, broken([json.dumps(RESULTS).encode()]) | JSON, "results.json"),
    "spec": Target(
        _specs,
        broken([spec.encode() for spec in SPECS]) | st.text(max_size=30).map(lambda t: t.encode("utf-8", "replace")),
    ),
    "arguments": Target(
        lambda path: options.key_values(_text(path), "--gen-kwargs"), broken([b"a=1,b=text", b'{"a": 1}'])
    ),
    "image": Target(
        _image,
        broken([picture(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")] + [picture("PNG", "P")]),
    ),
}


def fault(name: str, data: bytes, folder: Path) -> BaseException | None:
    """Feed a reader; return what it raised that it should not, or None."""
    target = TARGETS[name]
    path = folder / target.name
    path.write_bytes(data)
    try:
        with warnings.catch_warnings(action="ignore"):
            target.read(path)
    except VlmFixError as error:
        text = str(error)
        if "\n" in text or len(text) > 1500:
            return AssertionError(f"not one sentence: {text[:300]!r}")
    except Exception as error:
        return error
    return None
