"""vlm-fix compare: two files of answers, one verdict."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import counted
from vlm_fix.eval.scorers.benchmark import Argument, Benchmark
from vlm_fix.eval.scorers.registry import BENCHMARKS, PLAIN

from . import doubts
from .common import add, add_json, check_figure, console, table

ABOUT = """The files are those of `vlm-fix score BENCHMARK`, made by any code; its other options are given here too:

  vlm-fix compare greedy.jsonl method.jsonl other.jsonl --benchmark chair
  vlm-fix compare base.jsonl method.jsonl --benchmark pope --questions coco_pope_random.json

better, worse: the 95 % interval of the difference (paired bootstrap over images) excludes 0; of captions that of CHAIR_i
at equal recall, the longer captions cut short. Better only by saying no: yes is told from no no better than before (d').
Better only by saying less: CHAIR_i is lower, but not at equal recall.
mended: only NEW is right (captions: free of hallucination), broken: only BASE."""
OUTCOMES = ("mended", "broken")
MOVES = {"fn_to_tp": "FN>TP", "tp_to_fn": "TP>FN", "fp_to_tn": "FP>TN", "tn_to_fp": "TN>FP"}


def add_to(commands: Any) -> None:
    parser = add(commands, "compare", "compare answers with a baseline's: one verdict", run, ABOUT)
    parser.add_argument("base", metavar="BASE", help="answers of the baseline")
    parser.add_argument("new", metavar="NEW", nargs="+", help="answers of a method to the same questions")
    parser.add_argument("--benchmark", required=True, choices=BENCHMARKS, help="what the answers are to")
    options: dict[str, tuple[Argument, list[str]]] = {}
    for benchmark in BENCHMARKS.values():
        for argument in _inputs(benchmark):
            options.setdefault(argument.dest, (argument, []))[1].append(benchmark.name)
    for dest, (argument, names) in options.items():
        shown = {name: value for name, value in argument.options.items() if name not in ("default", "help", "nargs")}
        parser.add_argument(
            f"--{dest.replace('_', '-')}",
            **shown,
            default=argparse.SUPPRESS,
            help=f"of {', '.join(names)}: see `vlm-fix score {names[0]} --help`",
        )
    add_common(parser)
    add_json(parser)


def add_common(parser: Any) -> None:
    parser.add_argument("--common", action="store_true", help="compare only the images that both files have")
    parser.add_argument(
        "--frontier", metavar="FILE", help="figure of CHAIR_i over recall, captions cut shorter and shorter"
    )


def run(args: argparse.Namespace) -> None:
    benchmark = BENCHMARKS[args.benchmark]
    known = {argument.dest: argument for argument in _inputs(benchmark)}
    for dest in vars(args).keys() - known.keys():
        if any(dest == other.dest for made in BENCHMARKS.values() for other in _inputs(made)):
            raise VlmFixError(f"--{dest.replace('_', '-')} has no effect on {benchmark.name}: leave it out.")
    given: dict[str, Any] = {}
    for dest, argument in known.items():
        if not argument.name.startswith("-") and not hasattr(args, dest) and argument.options.get("nargs") != "?":
            raise VlmFixError(f"{benchmark.title} also needs --{dest}: {argument.options['help']}.")
        default = False if argument.options.get("action") == "store_true" else argument.options.get("default")
        given[dest] = getattr(args, dest, default)
        if (choices := argument.options.get("choices")) and given[dest] not in (default, *choices):
            raise VlmFixError(f"--{dest} {given[dest]} is none of {benchmark.name}: choose from {', '.join(choices)}.")
    show(benchmark, args.base, args.new, given, args)


def show(benchmark: Benchmark, base: str, new: list[str], given: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Print the comparison of each NEW with BASE; `given` are the other values of `Benchmark.results`."""
    from vlm_fix.eval.compare import compare, shared

    curved = [task for task, layout in benchmark.layouts.items() if getattr(layout.answers, "at_share", None)]
    if args.frontier and not curved:
        raise VlmFixError(f"--frontier has no effect on {benchmark.name}: it is for captions.")
    if args.frontier:
        check_figure("frontier", args.frontier)
    tell = functools.partial(print, file=sys.stderr)
    results = {
        path: benchmark.results(**given, **{benchmark.answers: path}, tell=tell) for path in dict.fromkeys([base, *new])
    }
    drawn = _drawn(results, curved[0], args.common) if args.frontier else {}
    for path, scored in results.items():
        doubts.tell(benchmark.shown(scored), benchmark, path)
    told: list[dict[str, Any]] = []
    for path in new:
        parts = [
            (task, part, *(shared(one, other) if args.common else (one, other)))
            for task, parts in results[base].items()
            for part, one in parts.items()
            if (other := results[path].get(task, {}).get(part))
        ]
        if not parts:
            raise VlmFixError(
                f"{base} and {path} share no part of {benchmark.title}: give answers to the same questions."
            )
        for task, part, one, other in parts:
            found = compare(benchmark.layouts[task], [(one, other)], every=True)
            unparsed = [getattr(side, "unparsed", 0) for side in (one, other)]
            about = {"base": base, "new": path, "task": task, "part": part, "n": len(one.rows), "unparsed": unparsed}
            told.append({**about, **found})
    if args.frontier:
        _draw(benchmark, curved[0], drawn, args.frontier)
    if args.json:
        print(json.dumps(told, indent=2))
        return
    for each in told:
        _print(benchmark, each)


def _drawn(results: Mapping[str, Any], task: str, common: bool) -> dict[str, Any]:
    """The captions of each file; `common`: of the images that all files have."""
    from vlm_fix.eval.compare import shared

    for path, found in results.items():
        if task not in found:
            raise VlmFixError(f"--frontier draws captions, and {path} has none: leave it out, or give captions too.")
    base, *others = (next(iter(found[task].values())) for found in results.values())
    if common:
        for other in others:
            base, _ = shared(base, other)
        others = [shared(base, other)[1] for other in others]
    return dict(zip(results, (base, *others), strict=True))


def _draw(benchmark: Benchmark, task: str, captions: Mapping[str, Any], place: str) -> None:
    from vlm_fix.eval.compare import frontier
    from vlm_fix.eval.report.frontier import draw
    from vlm_fix.eval.scorers.benchmark import Captions

    layout = benchmark.layouts[task]
    answers = layout.answers
    assert isinstance(answers, Captions)
    curves = {path: frontier(layout, answers, found) for path, found in captions.items()}
    names = [Path(path).name for path in curves]
    shown = dict(zip(names, curves.values(), strict=True)) if len({*names}) == len(names) else curves
    draw(shown, answers.heading, answers.found, place)


def _print(benchmark: Benchmark, found: Mapping[str, Any]) -> None:
    names = [Path(found[side]).name for side in ("base", "new")]
    heads = names if names[0] != names[1] else [found["base"], found["new"]]
    title = f"{benchmark.title}, {found['n']} {found['part']}" if found["part"] in WHOLES else ""
    grid = table("", *heads, "difference, 95 % interval", gap=0)
    grid.title, grid.title_justify = (
        title or f"{benchmark.title}, {found['part']}, {counted(found['n'], 'answer')}",
        "left",
    )
    columns = benchmark.layouts[found["task"]].columns
    for name, one in found["delta"].items():
        grid.add_row(columns.get(name, name.replace("_", " ")), *_cells(one, 1 if name in PLAIN else 100))
    for key, label in (
        ("said_yes", "answers of yes"),
        ("said_no", "answers of no"),
        ("d_prime", "d'"),
        ("equal_recall", "at equal recall"),
    ):
        if key in found:
            grid.add_row(label, *_cells(found[key], 1 if key == "d_prime" else 100, 2 if key == "d_prime" else 1))
    if any(found["unparsed"]):
        grid.add_row("neither yes nor no", *map(str, found["unparsed"]), "")
    equal = found.get("equal_length", {})
    for name, one in equal.items():
        grid.add_row(f"{columns.get(name, name)} at equal length", *_cells(one, 100))
    if found.get("rate_ratio"):
        one = found["rate_ratio"]
        star = "*" if one["low"] > 1 or one["high"] < 1 else ""
        change = f"x{one['ratio']:.2f} \\[{one['low']:.2f}, {one['high']:.2f}]{star}"
        grid.add_row(f"hallucinations, words equal{' (extrapolated)' * one['extrapolated']}", "", "", change)
    screen = console()
    screen.print(grid)
    if (found.get("rate_ratio") or {}).get("extrapolated"):
        doubts.note(
            "hardly a caption of one file is as long as one of the other, so their rates at equal words are extrapolated: take "
            "those at equal length or recall"
        )
    counts = [f"{name} {found['outcomes'][name]}" for name in OUTCOMES]
    moves = [f"{label} {found['transitions'][name]}" for name, label in MOVES.items()] if "transitions" in found else []
    screen.print(f"{', '.join(counts)} (McNemar p = {found['outcomes']['p']:.2g})" + "".join(f"  {m}" for m in moves))
    screen.print(f"{found['verdict']['text']}\n", soft_wrap=True, style="bold", markup=False)


WHOLES = ("captions", "questions")


def _cells(one: Mapping[str, Any], scale: int, digits: int = 1) -> list[str]:
    base, method, delta, low, high = (scale * one[key] for key in ("base", "method", "delta", "low", "high"))
    star = "*" if one["excludes_zero"] else ""
    change = f"{delta:+.{digits}f} \\[{low:.{digits}f}, {high:.{digits}f}]{star}"
    return [f"{base:.{digits}f}", f"{method:.{digits}f}", change]


def _inputs(benchmark: Benchmark) -> list[Argument]:
    """The arguments beside the answers."""
    return [argument for argument in benchmark.arguments if argument.dest != benchmark.answers]
