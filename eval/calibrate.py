"""Calibrate: find a method's parameters for one model on labelled yes/no questions, and score them on others.

The questions are POPE's adversarial ones (about the absent object seen most often with a present one), over Picto or a
folder of COCO images. Images are split at random into two halves: parameters are found on the first, the scores before
and after are from the second. A search takes the value that answers most questions of the first half right; among equals,
the one most confident in the right answers. Use other images for benchmarks afterwards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import platform
import random
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import vlm_fix
from vlm_fix.calibrated import Calibration, sizes
from vlm_fix.calibration.search import accuracy, answer_scores, sureness
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import tasks
from vlm_fix.eval.picto.scene_types import COCO_IDS
from vlm_fix.eval.run import generation, loading
from vlm_fix.eval.settings import Settings
from vlm_fix.eval.stats import mcnemar
from vlm_fix.families import arch_of
from vlm_fix.method import Method
from vlm_fix.registry import parse_spec
from vlm_fix.sample import Sample
from vlm_fix.spelling import split
from vlm_fix.tensors import Tensors

WORDS = (("yes", "no"), ("Yes", "No"), (" yes", " no"), (" Yes", " No"))
Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class Result:
    """The calibration, and what a search tried on the first half: (options, accuracy), the model alone ({}) first."""

    calibration: Calibration
    tried: list[tuple[dict[str, str], float]]


def calibrate(
    spec: str,
    model: str = "picto-llava",
    data: str = "picto:train",
    limit: int = 300,
    seed: int = 0,
    search: Mapping[str, Sequence[str]] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress = lambda label, share: None,
    loaded: tuple[Any, Any, dict[str, Any]] | None = None,
    pairs: str | None = None,
    questions: tasks.pope.Pope | None = None,
) -> Result:
    """Calibrate the method `spec` with `limit` questions to find parameters and as many to score them.

    Parameters set in `spec` are kept. `search` maps options to the values to try, in all combinations. `loaded` is the
    (model, processor, identity) of `loading.load_model`; `pairs` a JSONL file of caption pairs (`tasks.pairs`); `questions` a
    task that has been built of the data already.
    Raises VlmFixError for bad input, if nothing is found, or if no value of a search beats the model alone.
    """
    method = parse_spec(spec)
    if limit < 2:
        raise VlmFixError(f"--limit is {limit}: give at least 2 questions a half.")
    grid = [dict(zip(search or {}, values, strict=True)) for values in itertools.product(*(search or {}).values())]
    for options in grid:  # report a bad value now, not after the causal tracing
        _with(method, options)
    own = type(method).calibrate is not Method.calibrate
    if not own and not search:
        method.calibrate(None, (), seed, progress)
    if own and not search and method.neutral:
        raise VlmFixError(f"{spec} changes nothing, so there is nothing to find for it; raise its strength.")
    if own and pairs and (not Path(pairs).is_file() or data.startswith("picto:")):
        raise VlmFixError(
            f"--pairs {pairs} is no file: give a JSONL file with image, value and h_value."
            if not Path(pairs).is_file()
            else f"--pairs {pairs} names images of a folder: say which with --data coco:DIR."
        )
    task = questions or _questions(data, limit, seed)
    net, processor, identity = loaded or loading.load_model(model, dtype, device)
    halves = _halves(task, limit, seed)
    inputs = _encoded(net, processor, [*halves[0], *halves[1]], progress)
    yes, no = _answer_ids(net, processor, inputs[:8])
    words = _vocabulary(processor, getattr(method, "concept", None) or list(COCO_IDS))
    samples = [
        Sample(x, *((yes, no) if s.reference["label"] == "yes" else (no, yes)), words)
        for x, s in zip(inputs, [*halves[0], *halves[1]], strict=True)
    ]
    first, second = samples[: len(halves[0])], samples[len(halves[0]) :]
    shown = first
    if own and method.calibrates_on == "captions":
        images = {s.file: dataclasses.replace(s, prompt=tasks.sample.CAPTION_PROMPT) for s in halves[0]}
        shown = [Sample(x, yes, no, words) for x in _encoded(net, processor, list(images.values()), progress)]
    if own and method.calibrates_on == "pairs":
        shown = _pairs(net, processor, halves, data, pairs, limit, seed, progress)
    elif pairs:
        raise VlmFixError(f"{method.name} does not calibrate on caption pairs; leave --pairs out.")
    given = {name: v for name in sorted(method.given) if (v := getattr(method, name)) is not None}
    found = {**given, **(method.calibrate(net, shown, seed, progress) if own else {})}
    if empty := [k for k, v in found.items() if v == () or (isinstance(v, Tensors) and not v.named)]:
        raise VlmFixError(f"{spec}: calibrate found nothing for {empty[0]} with these settings; raise its strength.")
    method = dataclasses.replace(method, **found)
    tried = []
    for i, options in enumerate([{}, *grid] if search else []):
        scores = _scores(net, first, _with(method, options) if options else None)
        tried.append((options, accuracy(scores), sureness(scores)))
        progress("search", i / len(grid))
    if tried:
        alone, best = tried[0], max(tried, key=lambda t: t[1:])
        if best is alone:
            raise VlmFixError(
                f"{method.name}: the model alone answers {alone[1]:.1%} of the {len(first)} questions right, and no value "
                f"that was tried does better (at most {max(t[1] for t in tried[1:]):.1%}): try others, or leave it out."
            )
        method = _with(method, best[0])
        found = {**found, **{name: getattr(method, name) for name in best[0]}}
    progress("held-out questions", 0.0)
    before, after = _scores(net, second, None), _scores(net, second, method)
    progress("held-out questions", 1.0)
    calibration = Calibration(
        method=method.name,
        found={name: v if isinstance(v, Tensors) else json.loads(json.dumps(v)) for name, v in found.items()},
        model={**identity, **sizes(arch_of(net))},
        command=_command(spec, model, data, limit, seed, search, dtype, device, pairs),
        seed=seed,
        data={"source": task.data["source"], "questions": [len(first), len(second)], "sha256": _hash(task)},
        score=_compare(before, after, torch.tensor([s.target == yes for s in second])),
        versions={
            "vlm_fix": vlm_fix.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return Result(calibration, [(options, share) for options, share, _ in tried])


def parse_search(items: Sequence[str]) -> dict[str, list[str]]:
    """["alpha=0.1|0.2", "layers=2-"] -> {"alpha": ["0.1", "0.2"], "layers": ["2-"]}."""
    search: dict[str, list[str]] = {}
    for item in items:
        name, equals, values = item.partition("=")
        if name.strip() in search:
            raise VlmFixError(f"--search names {name.strip()} twice: give its values once, such as {name.strip()}=a|b.")
        search[name.strip()] = [v.strip() for v in split(values, r"\|") if v.strip()]
        if not equals or not search[name.strip()]:
            raise VlmFixError(f"--search {item!r} is not of the form name=value|value.")
    return search


def _with(method: Method, options: Mapping[str, str]) -> Method:
    """Return `method` with options given as text, checked."""
    parsed = type(method).from_options(dict(options))
    return dataclasses.replace(method, **{name: getattr(parsed, name) for name in options})


def _command(
    spec: str, model: str, data: str, limit: int, seed: int, search: Any, dtype: str, device: str, pairs: str | None
) -> str:
    options = [x for k, v in (search or {}).items() for x in ("--search", f"{k}={'|'.join(v)}")]
    options += [x for k, v in (("--dtype", dtype), ("--device", device)) if v != "auto" for x in (k, v)]
    options += ["--pairs", pairs] if pairs else []
    words = ["vlm-fix", "calibrate", spec, "--model", model, "--data", data, "--limit", str(limit), "--seed", str(seed)]
    return shlex.join([*words, *options])


def _questions(data: str, limit: int, seed: int) -> tasks.pope.Pope:
    settings = Settings(
        benchmark="pope",
        data=data,
        limit=math.ceil(2 * limit / 6) + 1,
        seed=seed,
        splits=("adversarial",),
        labels="pope",
    )
    (task,) = tasks.build(settings)
    assert isinstance(task, tasks.pope.Pope)
    return task


def _hash(task: tasks.pope.Pope) -> str:
    return hashlib.sha256(json.dumps(task.data["sha256"], sort_keys=True).encode()).hexdigest()


def _halves(
    task: tasks.pope.Pope, limit: int, seed: int
) -> tuple[list[tasks.sample.Sample], list[tasks.sample.Sample]]:
    """Split into two halves of at most `limit` questions that share no image."""
    images = sorted({s.file for s in task.samples})
    random.Random(seed).shuffle(images)
    where = {file: i % 2 for i, file in enumerate(images)}
    first, second = ([s for s in task.samples if where[s.file] == half][:limit] for half in (0, 1))
    if not first or not second:
        raise VlmFixError(f"{task.data['source']} has too few images to split in two; give more data.")
    return first, second


def _encoded(
    model: Any, processor: Any, asked: Sequence[tasks.sample.Sample], progress: Progress
) -> list[dict[str, Any]]:
    inputs = []
    for i, s in enumerate(asked):
        inputs.append(dict(generation.encode(model, processor, [tasks.sample.load_image(s)], [s.prompt])))
        progress("images", (i + 1) / len(asked))
    return inputs


def _pairs(
    model: Any,
    processor: Any,
    halves: tuple[list[tasks.sample.Sample], list[tasks.sample.Sample]],
    data: str,
    file: str | None,
    limit: int,
    seed: int,
    progress: Progress,
) -> list[Sample]:
    """Return caption prompts with a truthful and a hallucinated answer each, of no image that is held out."""
    where, _, rest = data.partition(":")
    if file is None and where != "picto":
        raise VlmFixError(
            "this method calibrates on pairs of captions: name a JSONL file with --pairs, or use picto:train."
        )
    if file is None:
        made = tasks.pairs.of_picto(halves[0], seed)
    else:
        made = tasks.pairs.of_file(file, Path(rest), limit, {s.file for s in halves[1]}, seed)
    if len(made) < 2:
        told = f"raise --limit to {max(12, 2 * limit)} or more" if file is None else f"add pairs to {file}"
        raise VlmFixError(f"{len(made)} pairs of captions are too few, it takes 2; {told}.")
    inputs = _encoded(model, processor, [pair.sample for pair in made], progress)

    def ids(text: str) -> torch.Tensor:
        return torch.tensor([processor.tokenizer.encode(text, add_special_tokens=False)])

    return [Sample(x, 0, 0, answers=(ids(p.truthful), ids(p.hallucinated))) for x, p in zip(inputs, made, strict=True)]


def _first_id(processor: Any, before: str, text: str) -> int:
    """Return the first token of `text` when it follows `before`."""
    head, whole = (processor.tokenizer.encode(t, add_special_tokens=False) for t in (before, before + text))
    return whole[min(len(head), len(whole) - 1)]


def _vocabulary(processor: Any, words: Sequence[str]) -> dict[str, int]:
    """Return word -> its first token inside a sentence, without words unknown to the tokenizer."""
    ids = {word: _first_id(processor, "a", f" {word}") for word in words}
    return {word: i for word, i in ids.items() if i != processor.tokenizer.unk_token_id}


@torch.no_grad()
def _answer_ids(model: Any, processor: Any, inputs: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Return the first tokens of yes and no, in the spelling (capitals, leading space) that the model prefers."""
    pairs = [(_first_id(processor, "", y), _first_id(processor, "", n)) for y, n in WORDS]
    pairs = [pair for pair in dict.fromkeys(pairs) if pair[0] != pair[1]]
    if not pairs:
        raise VlmFixError("the tokenizer does not tell yes from no by the first token; calibrate cannot label answers.")
    p = sum(model(**x).logits[0, -1].float().softmax(-1).cpu() for x in inputs)
    assert isinstance(p, torch.Tensor)
    return max(pairs, key=lambda pair: float(p[list(pair)].sum()))


def _scores(model: Any, samples: Sequence[Sample], method: Method | None) -> torch.Tensor:
    """Return the [N, 2] scores of (right, wrong) answers, of the unwrapped model if there is no method."""
    with warnings.catch_warnings(action="ignore"):
        if method is None:
            return answer_scores(model, samples)
        with vlm_fix.wrapped(model, method):
            return answer_scores(model, samples)


def _compare(before: torch.Tensor, after: torch.Tensor, present: torch.Tensor) -> dict[str, Any]:
    """Compare the held-out half: accuracy, yes-ratio, mean log-probability of the right answer (of the two), numbers of
    changed answers and McNemar's p."""
    base, new = (s[:, 0] > s[:, 1] for s in (before, after))
    return {
        "questions": len(present),
        "accuracy_before": float(base.float().mean()),
        "accuracy_after": float(new.float().mean()),
        "yes_ratio_before": float((base == present).float().mean()),
        "yes_ratio_after": float((new == present).float().mean()),
        "sureness_before": sureness(before),
        "sureness_after": sureness(after),
        "mended": int((new & ~base).sum()),
        "broken": int((base & ~new).sum()),
        "mcnemar_p": mcnemar(base.tolist(), new.tolist()),
    }
