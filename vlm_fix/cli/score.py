"""vlm-fix score: score answers or captions that you have."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from typing import Any

from vlm_fix.eval.scorers.benchmark import Benchmark
from vlm_fix.eval.scorers.registry import BENCHMARKS

from .common import add, add_json

EXAMPLES = """examples:
  vlm-fix score pope answers.jsonl                         POPE's own questions about COCO, one split or all three
  vlm-fix score pope coco_pope_random.json answers.jsonl --scorer vcd
  vlm-fix score chair captions.jsonl --variant nltk --json"""


def add_to(commands: Any) -> None:
    group = add(commands, "score", "score answers or captions that you have", epilog=EXAMPLES)
    kinds = group.add_subparsers(metavar="BENCHMARK", required=True)
    for benchmark in BENCHMARKS.values():
        parser = add(kinds, benchmark.name, benchmark.score_what, functools.partial(_score, benchmark))
        for argument in benchmark.arguments:
            parser.add_argument(argument.name, **argument.options)
        add_json(parser)


def _score(benchmark: Benchmark, args: argparse.Namespace) -> None:
    told = functools.partial(print, file=sys.stderr)
    found = benchmark.score_files(**{a.dest: getattr(args, a.dest) for a in benchmark.arguments}, tell=told)
    _tell_misread(found)
    if not isinstance(found, dict):
        _print(args, benchmark.title, found)
    elif args.json:
        print(json.dumps(found, indent=2))
    else:
        _print_parts(benchmark.title, found)


def _tell_misread(found: Any) -> None:
    """Say how many answers the scorer takes against their plain word, with an example and the option that reads them."""
    results = found if isinstance(found, dict) else {"": found.to_dict()}
    for part, figures in results.items():
        if isinstance(figures, dict) and figures.get("misread"):
            where = f"{part}: " if part else ""
            print(
                f"note: {where}the scorer {figures['scorer']} takes {figures['misread']} answers against their plain word: "
                f"{figures['misread_example']}; --scorer ours reads them",
                file=sys.stderr,
            )


def _print(args: argparse.Namespace, title: str, result: Any) -> None:
    """Print the figures of a result; --json prints its rows as well."""
    import dataclasses

    if args.json:
        print(json.dumps(dataclasses.asdict(result) | result.to_dict(), indent=2, default=str))
        return
    for name, value in result.to_dict().items():
        if isinstance(value, float):
            print(f"{title}  {name:<20} {value:.5f}")
        elif isinstance(value, int | str):
            print(f"{title}  {name:<20} {value}")


def _print_parts(title: str, found: dict[str, Any]) -> None:
    """Print the figures of a benchmark's parts, then those of the whole."""
    for part, figures in found.items():
        for name, value in figures.items() if isinstance(figures, dict) else ():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {figure}" for key, figure in value.items())
            text = f"{value:.5f}" if isinstance(value, float) else value
            print(f"{title}  {part:<22} {name:<12} {text}")
    for name, value in found.items():
        if not isinstance(value, dict):
            print(f"{title}  {name:<35} {value:.2f}")
