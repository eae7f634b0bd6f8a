"""vlm-fix score: score answers or captions that you have."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .common import SCORERS, VARIANTS, add, add_json

EXAMPLES = """examples:
  vlm-fix score pope coco_pope_random.json answers.jsonl --scorer vcd
  vlm-fix score chair captions.jsonl --variant nltk --json"""


def add_to(commands: Any) -> None:
    group = add(commands, "score", "score answers or captions that you have", epilog=EXAMPLES)
    kinds = group.add_subparsers(metavar="BENCHMARK", required=True)

    pope = add(kinds, "pope", "score POPE answers", _pope)
    pope.add_argument("questions", metavar="QUESTIONS", help="JSON lines or array: question_id, image, text, label")
    pope.add_argument("answers", metavar="ANSWERS", help="JSON lines: question_id, text or answer")
    _add_scorer(pope)

    chair = add(kinds, "chair", "score captions with CHAIR", _chair)
    chair.add_argument("captions", metavar="CAPTIONS", help="JSON lines or array: image_id, caption")
    chair.add_argument("--variant", choices=VARIANTS, default="nltk", help="(%(default)s)")
    chair.add_argument("--drop-incomplete", action="store_true", help="drop a cut-off last sentence first")
    chair.add_argument("--ground-truth", metavar="FILE", help="objects per image; COCO train+val2014 is in the package")

    amber = add(kinds, "amber", "score AMBER answers", _amber)
    amber.add_argument("answers", metavar="ANSWERS", help="JSON array or lines: id, response")
    _add_scorer(amber)
    amber.add_argument("--variant", choices=VARIANTS, default="nltk", help="how nouns are found (%(default)s)")

    mme = add(kinds, "mme", "score MME answers", _mme)
    mme.add_argument("answers", metavar="DIR", help="folder with TASK.txt: image, question, truth, answer with tabs")
    _add_scorer(mme)

    hallusion = add(kinds, "hallusion", "score HallusionBench answers", _hallusion)
    hallusion.add_argument("answers", metavar="ANSWERS", help="HallusionBench.json with model_prediction in each row")
    _add_scorer(hallusion, "vlmevalkit", "%(default)s; official reads GPT-4's marks in the file")
    for parser in (pope, chair, amber, mme, hallusion):
        add_json(parser)


def _add_scorer(parser: argparse.ArgumentParser, default: str = "official", help: str = "(%(default)s)") -> None:
    parser.add_argument("--scorer", choices=SCORERS, default=default, help=help)


def _pope(args: argparse.Namespace) -> None:
    from vlm_fix.eval.scorers.pope import data as pope_data
    from vlm_fix.eval.scorers.pope import score as pope

    result = pope.score(pope_data.load_questions(args.questions), pope_data.load_answers(args.answers), args.scorer)
    _print(args, "POPE", result)


def _chair(args: argparse.Namespace) -> None:
    from vlm_fix.eval.scorers.chair import data as chair_data
    from vlm_fix.eval.scorers.chair import score as chair

    truth = chair_data.ground_truth(args.ground_truth or "coco", args.variant)
    captions = chair_data.load_captions(args.captions)
    if args.drop_incomplete:
        captions = [caption._replace(text=chair_data.whole_sentences(caption.text)) for caption in captions]
    _print(args, "CHAIR", chair.score(captions, truth, args.variant))


def _amber(args: argparse.Namespace) -> None:
    from vlm_fix.eval.scorers.amber import official as amber_file
    from vlm_fix.eval.scorers.amber import score as amber

    found = amber_file.score_file(args.answers, args.scorer, args.variant)
    whole = {"amber_score": amber.amber_score(found)} if {"captions", "questions"} <= found.keys() else {}
    figures = {part: result.to_dict() for part, result in found.items()}
    if args.scorer == "official":
        for part, result in found.items():
            figures[part]["printed"] = amber_file.printed(result, 0.001 if part == "existence" else 0.0001)
    _print_parts(args, "AMBER", figures, whole)


def _mme(args: argparse.Namespace) -> None:
    from vlm_fix.eval.scorers import mme

    questions, answers = mme.load_results(args.answers)
    found = mme.score(answers, questions, args.scorer)
    _print_parts(args, "MME", {part: result.to_dict() for part, result in found.items()})


def _hallusion(args: argparse.Namespace) -> None:
    from vlm_fix.eval.scorers import hallusion

    questions, answers = hallusion.load_answers(args.answers, args.scorer)
    found = hallusion.score(answers, questions, args.scorer)
    _print_parts(args, "HallusionBench", {part: result.to_dict() for part, result in found.items()})


def _print(args: argparse.Namespace, title: str, result: Any) -> None:
    """A score, without its rows unless --json."""
    import dataclasses

    everything = dataclasses.asdict(result)
    if args.json:
        print(json.dumps(everything, indent=2, default=str))
        return
    for name, value in everything.items():
        if isinstance(value, float):
            print(f"{title}  {name:<20} {value:.5f}")
        elif isinstance(value, int | str):
            print(f"{title}  {name:<20} {value}")


def _print_parts(
    args: argparse.Namespace, title: str, found: dict[str, dict[str, Any]], whole: dict[str, float] | None = None
) -> None:
    """The figures of a benchmark's parts, and of the whole."""
    whole = whole or {}
    if args.json:
        print(json.dumps(found | whole, indent=2))
        return
    for part, figures in found.items():
        for name, value in figures.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {figure}" for key, figure in value.items())
            text = f"{value:.5f}" if isinstance(value, float) else value
            print(f"{title}  {part:<22} {name:<12} {text}")
    for name, value in whole.items():
        print(f"{title}  {name:<35} {value:.2f}")
