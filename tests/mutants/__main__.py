"""`python -m tests.mutants --sample 200`: put a small fault into the code, run the tests of that part, and see that one fails.

Each change is tried in a process of its own, split off from one that has loaded the libraries. Survivors are printed; what is
to be said of them is in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import importlib.util
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .changes import Change, changed, changes

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240  # of processor time; a loop without an end is noticed, too
SCORERS = "tests/eval/scorers/test_{}.py"
PARTS: dict[str, dict[str, list[str]]] = {
    "kernels": {
        f"vlm_fix/attention/{name}.py": ["tests/attention/test_paths.py", "tests/attention/test_unedited_rows.py",
                                         "tests/attention/test_stacks.py", "tests/attention/test_softcap.py",
                                         "tests/attention/test_parameters.py", "tests/attention/test_heads.py"]
        for name in ("kernel", "scores", "edits", "stages", "strategies", "columns", "few_columns", "function", "plan")
    },
    "engine": {
        f"vlm_fix/{name}.py": ["tests/core/test_wrap.py", "tests/core/test_calls.py", "tests/core/test_generate.py",
                               "tests/core/test_inputs_and_caches.py", "tests/core/test_second_turn.py"]
        for name in ("engine", "generating", "forwards", "session", "options", "caches", "wrapping")
    },
    "stats": {"eval/stats.py": ["tests/eval/test_stats.py"]},
    "scorers": {
        "eval/scorers/yesno.py": [SCORERS.format("pope"), SCORERS.format("reader"), SCORERS.format("plain")],
        "eval/scorers/pope/score.py": [SCORERS.format("pope")],
        "eval/scorers/pope/repope.py": [SCORERS.format("repope")],
        "eval/scorers/pope/data.py": [SCORERS.format("pope_build"), SCORERS.format("pope")],
        "eval/scorers/chair/score.py": [SCORERS.format("chair")],
        "eval/scorers/chair/words.py": [SCORERS.format("chair")],
        "eval/scorers/amber/score.py": [SCORERS.format("amber")],
        "eval/scorers/amber/official.py": [SCORERS.format("amber")],
        "eval/scorers/mme.py": [SCORERS.format("mme")],
        "eval/scorers/hallusion.py": [SCORERS.format("hallusion")],
        "eval/scorers/pope_prob.py": [SCORERS.format("smaller_benchmarks")],
        "eval/scorers/beaf.py": [SCORERS.format("smaller_benchmarks")],
        "eval/scorers/reefknot.py": [SCORERS.format("smaller_benchmarks")],
        "eval/scorers/dash_b.py": [SCORERS.format("smaller_benchmarks")],
        "eval/scorers/opope.py": [SCORERS.format("smaller_benchmarks")],
        "eval/scorers/listed.py": [SCORERS.format("smaller_benchmarks")],
    },
}  # fmt: skip


class Changed(importlib.machinery.SourceFileLoader):
    """Loads a module with a change in it; also the finder that is asked for it first."""

    def __init__(self, name: str, path: str, number: int) -> None:
        super().__init__(name, path)
        self.number = number

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str):  # type: ignore[no-untyped-def]
        return compile(changed(Path(self.path).read_text(), self.number), self.path, "exec")


def outcome(change: Change | None, tests: list[str], said: Path = Path(os.devnull)) -> str:
    """ "killed", "survived" or "endless"; without a change "survived" is what has to be. What pytest says goes to `said`."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            where = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(where, 1)
            os.dup2(where, 2)
            if change:
                name = change.file.removesuffix(".py").replace("/", ".")
                name = name if name.startswith("vlm_fix.") else f"vlm_fix.{name}"
                sys.meta_path.insert(0, Changed(name, str(ROOT / change.file), change.number))
            import pytest

            status = int(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]))
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return "endless" if os.WIFSIGNALED(status) else "killed" if os.WEXITSTATUS(status) else "survived"


def chosen(part: str, sample: int, seed: int) -> Iterator[tuple[Change, list[str]]]:
    """A sample of the part's changes, by file and line."""
    made = [(c, tests) for file, tests in PARTS[part].items() for c in changes(file, (ROOT / file).read_text())]
    yield from sorted(random.Random(seed).sample(made, min(sample, len(made))), key=lambda m: (m[0].file, m[0].number))


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.mutants", description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated (all)")
    parser.add_argument("--sample", type=int, default=50, help="changes of each part")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["HF_HUB_OFFLINE"] = "1"
    parts = args.part or list(PARTS)
    with contextlib.suppress(ImportError):  # what every test needs, once
        import hypothesis  # noqa: F401
        import nltk  # noqa: F401
        import numpy  # noqa: F401
        import pytest  # noqa: F401

        if {"kernels", "engine"} & {*parts}:
            import torch  # noqa: F401
            from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration  # noqa: F401
    for part in parts:
        for tests in {tuple(tests): tests for tests in PARTS[part].values()}.values():
            with tempfile.TemporaryDirectory() as folder:
                said = Path(folder) / "said"
                if outcome(None, tests, said) != "survived":  # a sample would say that every change is noticed
                    print(f"{said.read_text()}\n{part}: {' '.join(tests)} fail without a change")
                    return 2
        found, began = Counter[str](), time.monotonic()
        for change, tests in chosen(part, args.sample, args.seed):
            fate = outcome(change, tests)
            found[fate] += 1
            if fate == "survived":
                print(f"  {change.file}:{change.line}: {change.told}", flush=True)
        total = sum(changes_of(part).values())
        print(
            f"{part}: {found.total()} of {total} changes tried (seed {args.seed}), {found['killed']} killed, "
            f"{found['endless']} without an end, {found['survived']} survived; {time.monotonic() - began:.0f} s",
            flush=True,
        )
    return 0


def changes_of(part: str) -> dict[str, int]:
    """File -> number of its changes."""
    return {file: len(changes(file, (ROOT / file).read_text())) for file in PARTS[part]}


if __name__ == "__main__":
    raise SystemExit(main())
