"""The product method x family: one cell is one method on the tiny model of one family, and what became of it.

`python -m tests.support.product` walks it, about six minutes on one core, and writes the record; after it, families to walk, or
`new` for the methods that are not in it yet.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path

import torch

import vlm_fix
from tests.support import families
from tests.support.cases import CASES
from tests.support.families import TINY
from tests.support.models import BUILD, IMAGE, make_inputs
from vlm_fix.families import arch_of
from vlm_fix.registry import list_methods

RECORD = Path(vlm_fix.__file__).parent / "families" / "record.json"
FAMILIES = (*BUILD, *TINY)
RECORDED = (*BUILD, *families.EVERY)  # with those whose towers need timm: `make test-timm`
PARTS = 4  # a run of the suite walks one of them
STEPS = 3
HYBRID = {  # for decoders of which only layers 1 and 3 have attention weights
    "act": "act:threshold=0.06,beta=0.1,layers=1|3",
    "ad_hh": "ad_hh:threshold=0.15,head_list=1.0|1.3|3.1|3.2",
    "ascd": "ascd:head_list=1.0|1.3|3.1,beta=0.01",
    "decore": "decore:head_list=1.0|1.3|3.1",
    "gift": "gift:alpha=3,source_layer=1,layers=3",
    "owl": "owl:beta=0.01,base=0.9|2.5,layers=1|3",
}
CROSSED = {  # Mllama's other layers read the image and have no attention to text
    "act": "act:threshold=0.06,beta=0.1,layers=0|2",
    "ascd": "ascd:head_list=0.0|0.3|2.1,beta=0.01",
    "decore": "decore:head_list=0.0|0.3|2.1",
    "head_pursuit": "head_pursuit:head_list=0.0|2.2|2.3,factor=-1",
}
CROPS = {
    "hiprune": "hiprune:keep=0.3",
    "downsample_image": "downsample_image:keep=0.33",
}  # a count is too small for crops
LESS = {"llava_onevision": 1}  # images of the longer prompt: the next one would be resized after it was packed
EAGER = {
    "yes_threshold": "yes_threshold:yes=3|69|32,no=20|52,mass=0.001,margin=0.9"
}  # acts wherever either word has a chance
CLEAR = {
    ("var", "gemma4"): "var:tau=1.6,min_visual_mass=0.02,rho=0.05,layers=0-3"
}  # at the usual gates it depends on the processor
GOOD = WORKS, IDLE, ALONE, REFUSED = "works", "found nothing to change", "works with one prompt at a time", "refused"
FAILED = "failed"


@functools.cache
def model_of(family: str):
    return BUILD[family]() if family in BUILD else families.build(family)


@functools.cache
def inputs_of(family: str, batch: bool):
    """A prompt of two images; with `batch` beside one of one image, padded."""
    images = [1, LESS.get(family, 2)] if batch else [LESS.get(family, 2)]
    return make_inputs(family, images) if family in BUILD else families.prompt(family, images)


def spec_of(method: str, family: str) -> str:
    """A spec of the method that acts on tiny models, for layers that this one has."""
    case = CLEAR.get((method, family)) or EAGER.get(method, CASES[method].specs[0])
    arch = arch_of(model_of(family))
    if arch.family.cells == "anyres":
        case = CROPS.get(method, case)
    special = CROSSED if arch.family.crosses else HYBRID if len(arch.attention) < 4 else {}
    return special.get(method, case)


def answer(family: str, batch: bool, scores: bool = True):
    """-> tokens, and with `scores` the scores and logits of every step."""
    torch.manual_seed(0)
    out = model_of(family).generate(
        **inputs_of(family, batch),
        max_new_tokens=STEPS,
        do_sample=False,
        suppress_tokens=[IMAGE],
        return_dict_in_generate=True,
        **({"output_scores": True, "output_logits": True} if scores else {}),
    )
    steps = [torch.stack(s, dim=1) for s in (out.scores, out.logits) if s is not None]
    return out.sequences, steps


@functools.cache
def plain(family: str, batch: bool):
    return answer(family, batch)


def same(one, other) -> bool:
    return torch.equal(one[0], other[0]) and all(map(torch.equal, one[1], other[1]))


def unmoved(scores, expected) -> bool:
    """True if scores differ by rounding at most: another path through attention is no effect."""
    finite = torch.isfinite(scores) & torch.isfinite(expected)
    moved = torch.isfinite(scores) != torch.isfinite(expected)
    return not bool(moved.any()) and float((scores - expected)[finite].abs().max()) < 1e-5


def sound(found, expected) -> bool:
    """Tokens of the vocabulary, and no score that is not a number; ruled-out tokens may be -inf, but not all of a step."""
    tokens, steps = found
    fine = tokens.shape[0] == expected[0].shape[0] and bool(((tokens >= 0) & (tokens < 96)).all())
    return fine and all(bool((~s.isnan()).all() & torch.isfinite(s).any(dim=-1).all()) for s in steps)


def walk(method: str, family: str) -> dict[str, str]:
    """One cell: {"outcome", "why"}. FAILED, with what happened, for everything that is neither right nor a clear refusal."""
    spec = spec_of(method, family)
    try:
        found = _attempt(spec, family, batch=True)
        if found["outcome"] == REFUSED and re.search(r"one prompt|batch|a single", found["why"]):
            alone = _attempt(spec, family, batch=False)
            found = {"outcome": ALONE, "why": found["why"]} if alone["outcome"] == WORKS else alone
    finally:
        vlm_fix.unwrap(model_of(family))
    for batch in [True] * (found["outcome"] != FAILED) + [False] * (found["outcome"] == ALONE):
        if "generate" in vars(model_of(family)) or not same(answer(family, batch), plain(family, batch)):
            return {"outcome": FAILED, "why": f"{spec}: after unwrap the model answers otherwise"}
    return found


def _attempt(spec: str, family: str, batch: bool) -> dict[str, str]:
    expected = plain(family, batch)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with vlm_fix.wrapped(model_of(family), spec):
                found = answer(family, batch, CASES[spec.partition(":")[0]].scores)
    except vlm_fix.VlmFixError as error:
        return {"outcome": FAILED if "were NaN" in str(error) else REFUSED, "why": str(error)}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        own = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if "/vlm_fix/" in f.filename or "/methods/" in f.filename
        ]
        where = own[-1] if own else where
        return {
            "outcome": FAILED,
            "why": f"{spec}: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})",
        }
    if not sound(found, expected):
        return {"outcome": FAILED, "why": f"{spec}: the answer is not finite"}
    idle = next((str(w.message) for w in said if "changed nothing" in str(w.message)), "")
    case = CASES[spec.partition(":")[0]]
    if case.effect and case.scores and not idle and unmoved(found[1][0], expected[1][0]):
        return {"outcome": FAILED, "why": f"{spec}: it changed nothing, without a word"}
    return {"outcome": IDLE if idle else WORKS, "why": idle}


def chosen_part() -> int | None:
    """The part that this run walks, None: all of them. It follows the commit, or without one the day."""
    asked = os.environ.get("VLM_FIX_PRODUCT", "")
    if asked == "all":
        return None
    if asked:
        return int(asked) % PARTS
    try:
        where = Path(__file__).parent
        now = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=where, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        now = time.strftime("%Y-%m-%d").encode()
    return zlib.crc32(now) % PARTS


def part_of(family: str, methods: list[str], part: int | None) -> list[str]:
    """The methods that a part tries on this family."""
    return [m for m in methods if part in (None, zlib.crc32(f"{m} {family}".encode()) % PARTS)]


def recorded(family: str, method: str) -> dict[str, str]:
    """The cell in the record, which names only what does not simply work."""
    return json.loads(RECORD.read_text())["families"][family]["cells"].get(method, {"outcome": WORKS, "why": ""})


def main(asked: list[str]) -> int:
    """Walk these families, or all, and put into the record each that has no failed cell. `new`: new methods alone."""
    methods, bad = [m.name for m in list_methods()], 0
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {"methods": [], "families": {}}
    record, new = known["families"], asked == ["new"]
    tried = [m for m in methods if m not in known["methods"]]
    for family in FAMILIES if new else asked or FAMILIES:
        added = new and family in record  # a new family is walked whole
        cells = {method: walk(method, family) for method in (tried if added else methods)}
        failed = [c["why"] for c in cells.values() if c["outcome"] == FAILED]
        print(family, *sorted(Counter(c["outcome"] for c in cells.values()).items()), *failed, sep="\n  ", flush=True)
        bad += len(failed)
        if not failed:
            arch = arch_of(model_of(family))
            cells = (record[family]["cells"] if added else {}) | {
                m: c for m, c in cells.items() if c["outcome"] != WORKS
            }
            about = {"family": arch.family.name, "decoder": arch.text_type}
            record[family] = about | {"cells": {m: cells[m] for m in methods if m in cells}}
        if not failed and not new:
            _write(methods, record)
    if new and not bad:
        _write(methods, record)
    return 1 if bad else 0


def _write(methods: list[str], record: dict) -> None:
    kept = {f: record[f] for f in RECORDED if f in record}
    RECORD.write_text(json.dumps({"methods": methods, "families": kept}, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
