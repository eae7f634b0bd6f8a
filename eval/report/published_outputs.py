"""Score what public repositories hold of larger models: captions and answers with and without a method, same images.

    python -m vlm_fix.eval.report.published_outputs FOLDER --copies COPIES [--only NAME,...]
    python -m vlm_fix.eval.report.published_outputs FOLDER --page docs/published-outputs.md

FOLDER/pairs.json lists the pairs: repository, commit, path and sha256 of both files. The files are not ours and not in this
repository: COPIES holds clones, COPIES/OWNER/NAME/PATH. The first form scores them and writes FOLDER/scores.json (`--only`
prints its rows instead), the second makes the page from scores.json alone.

CHAIR has C_S, C_I, recall, words, and C_S and C_I with both captions cut to the same number of words; POPE has accuracy, F1,
yes-ratio and McNemar's test. Each difference has its 95 % interval (paired bootstrap over images) and its p-value, also
corrected by Holm's procedure over all pairs of the benchmark.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import write_atomic
from vlm_fix.eval.scorers.chair import data as chair_files
from vlm_fix.eval.scorers.chair import score as chair
from vlm_fix.eval.scorers.chair import words
from vlm_fix.eval.scorers.choices import Variant
from vlm_fix.eval.scorers.pope import data as pope_files
from vlm_fix.eval.scorers.pope import score as pope
from vlm_fix.eval.stats import Sums, holm, outcomes, paired_bootstrap, ratio

from .tables import line

COLUMNS = {
    "chair": {
        "chair_s": "C_S ↓",
        "chair_i": "C_I ↓",
        "recall": "recall ↑",
        "words": "words",
        "equal_chair_i": "C_I at equal length ↓",
    },
    "pope": {"accuracy": "accuracy ↑", "f1": "F1 ↑", "yes_ratio": "yes-ratio"},
}
SIDES = "base", "method"
PLAIN = ("words",)  # not a fraction


def _words(sums: Sums) -> Any:
    return ratio(sums["words"], sums["n"])


def command(name: str, folder: str = "results/published-outputs") -> str:
    """Return the command that makes the row of a pair again."""
    return f"python -m vlm_fix.eval.report.published_outputs {folder} --copies COPIES --only {name}"


def read_pairs(folder: Path) -> dict[str, Any]:
    """Read FOLDER/pairs.json. Raises VlmFixError if it is missing, malformed or names an unknown repository."""
    path = folder / "pairs.json"
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        names = [pair["name"] for pair in listed["pairs"]]
        unknown = {p[side]["repository"] for p in listed["pairs"] for side in SIDES} - set(listed["repositories"])
        odd = {pair["benchmark"] for pair in listed["pairs"]} - set(COLUMNS)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise VlmFixError(f"{path} is not a list of pairs ({error!r}); results/README.md says what it holds.") from None
    if wrong := sorted(unknown) + sorted(odd) + sorted({name for name in names if names.count(name) > 1}):
        raise VlmFixError(
            f"{path}: {wrong[0]!r} is no listed repository or benchmark, or names two pairs; mend the list."
        )
    return listed


def local(copies: Path, repository: str, commit: str, file: Mapping[str, str]) -> Path:
    """Return the local copy of a file, checked. Raises VlmFixError if it is absent or has another sha256."""
    path = copies / repository / file["path"]
    get = (
        f"git clone https://github.com/{repository} {copies / repository} && "
        f"git -C {copies / repository} checkout {commit}"
    )
    if not path.is_file():
        raise VlmFixError(f"{path} is not there. The files of other people are not in this repository: {get}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != file["sha256"]:
        raise VlmFixError(
            f"{path} has the sha256 {found}, but the pair was listed with {file['sha256']}; take the file of the listed "
            f"commit: {get}"
        )
    return path


def score_pair(
    pair: Mapping[str, Any], paths: Sequence[Path], variant: Variant = "nltk", truth: chair.GroundTruth | None = None
) -> dict[str, Any]:
    """Score the two files of a pair. Returns images, samples and, by metric, base, method, delta, low, high and p."""
    if pair["benchmark"] == "chair":
        results = []
        for path in paths:
            captions = sorted(chair_files.load_captions(path), key=lambda caption: caption.image_id)
            results.append(chair.score(captions, truth or chair_files.ground_truth(variant=variant), variant))
        sides = [
            [row | {"words": len(scored.caption.split())} for row, scored in zip(r.rows, r.captions, strict=True)]
            for r in results
        ]
        metrics = {name: chair.METRICS[name] for name in ("chair_s", "chair_i", "recall")} | {"words": _words}
        compared = paired_bootstrap(metrics, sides[0], sides[1])
        cut = {f"equal_{name}": chair.METRICS[name] for name in ("chair_s", "chair_i")}
        compared |= paired_bootstrap(cut, *chair.at_equal_length(*results))
        extra: dict[str, Any] = {}
    else:
        questions = pope_files.coco_questions(pair["split"])[: pair.get("first")]
        scored = [pope.score(questions, pope_files.load_answers(path)) for path in paths]
        sides = [result.rows for result in scored]
        compared = paired_bootstrap({name: pope.METRICS[name] for name in COLUMNS["pope"]}, sides[0], sides[1])
        extra = {"outcomes": outcomes(sides[0], sides[1], lambda row: row["tp"] or row["tn"])}
        extra["unparsed"] = dict(zip(SIDES, (result.unparsed for result in scored), strict=True))
    figures = {name: comparison.to_dict() | {"p": comparison.p} for name, comparison in compared.items()}
    return {"samples": len(sides[0]), "images": len({row["image"] for row in sides[0]}), "figures": figures, **extra}


def score_all(folder: Path, copies: Path, only: Sequence[str] = ()) -> dict[str, Any]:
    """Score the listed pairs, or those named in `only`; returns what scores.json holds."""
    listed = read_pairs(folder)
    known = {pair["name"]: pair for pair in listed["pairs"]}
    if missing := [name for name in only if name not in known]:
        raise VlmFixError(f"no pair is called {missing[0]!r}; there are {', '.join(known)}.")
    chosen = [known[name] for name in only or known]
    variant = listed.get("variant", "nltk")
    truth = chair_files.ground_truth(variant=variant)
    rows = []
    for pair in chosen:
        paths = []
        for side in SIDES:
            repository = pair[side]["repository"]
            paths.append(local(copies, repository, listed["repositories"][repository]["commit"], pair[side]))
        rows.append({**pair, **score_pair(pair, paths, variant, truth), "command": command(pair["name"])})
    if not only:  # a correction needs the whole table
        correct(rows)
    scorers = {"chair": f"{variant}, {words.COMMITS[variant]}", "pope": f"official, {pope.SOURCE}"}
    return {"scorers": scorers, "repositories": listed["repositories"], "pairs": rows}


def correct(rows: Sequence[dict[str, Any]]) -> None:
    """Add to every figure its p-value by Holm's procedure over all rows of its benchmark, as `p_holm`."""
    for benchmark in COLUMNS:
        table = [row["figures"] for row in rows if row["benchmark"] == benchmark]
        for name in table[0] if table else ():
            for figures, p in zip(table, holm([figures[name]["p"] for figures in table]), strict=True):
                figures[name]["p_holm"] = p


# ---------------------------------------------------------------------------------------------------------------- page

HEAD = """# Outputs that others published

Made by `make docs` from [results/published-outputs](../results/published-outputs): do not edit.

These are **not our runs**. Authors and users of other methods put the captions and answers of LLaVA-1.5-7B and of other
models into their public repositories, with and without a method, for the same images. We read {files} such files from
{repositories} repositories, unchanged, and scored both sides of {pairs} pairs with this package's scorers and intervals. They
are the first figures here of models with 7 billion parameters; nothing in them says how *our* implementation of a method
does at that size. None of the files is in this repository.

Read the rows with care:

- Both sides of a row answer about the same images, but a row is only as fair as its two runs. The columns say how each side
  was decoded, as far as its repository says so; where the sides differ in more than the method, the row says it.
- Captions of other lengths are no like for like: a longer caption names more objects, wrong ones too. So recall and words
  stand beside C_S and C_I, and the last column has C_I with each pair of captions cut to the shorter one's number of words.
- A method that answers "yes" less often gains on POPE wherever the baseline says it too often: the yes-ratio is there to see
  it. Half of the labels are yes.
- Rows of different repositories are of different images, prompts and lengths: compare inside a row only. Many pairs share one
  baseline file, so that their differences are not independent.
- Repositories publish what they publish: which runs are missing we cannot know. *Fine-tuned* rows train the model; the others
  leave it as it is.
"""
CELLS = (
    "Percent, and words as they are: baseline → with the method, below it the difference with its 95 % interval (paired "
    "bootstrap over images, 2000 resamples). Bold: significant at 5 % after Holm's correction over the {n} rows of this table, "
    "each column for itself."
)
TITLES = {"chair": "Captions: CHAIR", "pope": "Yes/no questions: POPE on COCO"}


def page(folder: Path) -> str:
    """Return docs/published-outputs.md, from FOLDER/scores.json alone."""
    path = folder / "scores.json"
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise VlmFixError(f"{path} cannot be read: score the pairs first, with --copies.") from None
    rows, used = scores["pairs"], {(r[s]["repository"], r[s]["path"]) for r in scores["pairs"] for s in SIDES}
    counts = {"files": len(used), "repositories": len({name for name, _ in used}), "pairs": len(rows)}
    parts = [HEAD.format(**counts).strip()]
    for benchmark, title in TITLES.items():
        table = [row for row in rows if row["benchmark"] == benchmark]
        if table:
            about = f"Scorer: {scores['scorers'][benchmark]}. {CELLS.format(n=len(table))}"
            parts += [f"## {title}", about, _reading(benchmark, table), "\n".join(_table(benchmark, table))]
    parts += ["## Whose outputs", "\n".join(_repositories(scores["repositories"], rows))]
    parts += ["## The files", FILES, "\n".join(_files(rows))]
    return "\n\n".join(parts) + "\n"


FILES = f"""`git clone https://github.com/OWNER/NAME COPIES/OWNER/NAME` and check out the commit above, then

```
{command("ROW")}
```

prints a row again, after checking the sha256 of both files; without `--only` all rows go into
`results/published-outputs/scores.json`."""


def _table(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = ["row", "model", "method", *COLUMNS[benchmark].values()]
    heads += ["mended / broken, McNemar p"] if benchmark == "pope" else []
    lines = [line(heads), line(["---"] * 3 + ["---:"] * (len(heads) - 3))]
    notes = []
    for row in rows:
        about = f"{row['base']['what']} → {row['method']['what']}; {row['samples']} " + (
            "captions" if benchmark == "chair" else f"questions, {row['split']}"
        )
        cells = [f"`{row['name']}`", row["model"], f"**{row['label']}**<br>{about}"]
        cells += [_figure(name, row["figures"][name]) for name in COLUMNS[benchmark]]
        if benchmark == "pope":
            told = row["outcomes"]
            cells.append(f"{told['mended']} / {told['broken']}, {told['p']:.2g}")
        lines.append(line(cells))
        if row.get("note"):
            notes.append(f"- `{row['name']}`: {row['note']}")
    return [*lines, *([""] if notes else []), *notes]


def _reading(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Count the significant rows in a sentence."""

    def moved(name: str, sign: int) -> list[str]:
        return [
            r["name"] for r in rows if r["figures"][name]["p_holm"] < 0.05 and sign * r["figures"][name]["delta"] > 0
        ]

    n = len(rows)
    if benchmark == "pope":
        return (
            f"After the correction accuracy is higher in {len(moved('accuracy', 1))} and lower in "
            f"{len(moved('accuracy', -1))} of {n} rows."
        )
    fewer = moved("chair_i", -1)
    equal, lost = set(fewer) & set(moved("equal_chair_i", -1)), set(fewer) & set(moved("recall", -1))
    return (
        f"After the correction C_S is lower in {len(moved('chair_s', -1))} and C_I in {len(fewer)} of {n} rows; of these "
        f"{len(fewer)}, C_I is lower at equal length too in {len(equal)}, and recall is lower in {len(lost)}. Captions are "
        f"shorter in {len(moved('words', -1))} rows and longer in {len(moved('words', 1))}."
    )


def _figure(name: str, figure: Mapping[str, float]) -> str:
    scale = 1 if name in PLAIN else 100
    base, method, delta, low, high = (
        round(scale * figure[key], 1) + 0.0 for key in ("base", "method", "delta", "low", "high")
    )
    bold = "**" if figure["p_holm"] < 0.05 else ""
    return f"{base:.1f} → {method:.1f}<br>{bold}{delta:+.1f}{bold} [{low:.1f}, {high:.1f}]"


def _repositories(listed: Mapping[str, Mapping[str, str]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    used = {row[side]["repository"] for row in rows for side in SIDES}
    lines = [line(["repository", "commit", "licence", "whose outputs, and what it says of them"]), line(["---"] * 4)]
    for name, about in listed.items():
        if name in used:
            link = f"[{name}](https://github.com/{name})"
            lines.append(line([link, f"`{about['commit'][:10]}`", about["licence"], about["whose"]]))
    return lines


def _files(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [line(["row", "side", "file", "sha256"]), line(["---"] * 4)]
    for row in rows:
        for side in SIDES:
            file = row[side]
            where = f"`{file['repository']}` `{file['path']}`"
            lines.append(line([f"`{row['name']}`", side, where, f"`{file['sha256'][:16]}`"]))
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; the module docstring describes its arguments."""
    parser = argparse.ArgumentParser(
        "published_outputs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the folder with pairs.json")
    parser.add_argument("--copies", type=Path, help="the folder with clones of the repositories")
    parser.add_argument("--only", default="", help="names of pairs, with commas: print these rows, write nothing")
    parser.add_argument("--page", type=Path, help="write the page from scores.json")
    asked = parser.parse_args(argv)
    if not asked.copies and not asked.page:
        parser.error("give --copies to score the files, or --page to write the page from scores.json")
    if asked.copies:
        only = [name.strip() for name in asked.only.split(",") if name.strip()]
        scores = score_all(asked.folder, asked.copies, only)
        text = json.dumps(scores["pairs"] if only else scores, indent=1, ensure_ascii=False) + "\n"
        if only:
            print(text, end="")
        else:
            write_atomic(asked.folder / "scores.json", text)
    if asked.page:
        write_atomic(asked.page, page(asked.folder))


if __name__ == "__main__":
    main()
