"""Options of `vlm-fix eval` that would have no effect: an error says so before anything runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers.pope.data import PACKAGED


class Rule(NamedTuple):
    """An option acts only if `acts(args)`; `remedy` says what would make it act."""

    option: str
    acts: Callable[[Any], Any]
    remedy: str


def _samples(args: Any) -> bool:
    return bool(args.sample or (args.controls and (args.num_beams or 1) == 1))  # beside beams, the control is greedy


def _asks(*benchmarks: str) -> Callable[[Any], bool]:
    return lambda args: args.benchmark in benchmarks


def _own_questions(args: Any) -> bool:
    return args.benchmark in ("pope", "all") and not args.questions


def _has_splits(args: Any) -> bool:
    packaged = {*(args.questions or "").split(",")} & PACKAGED.keys()  # such as gqa
    return args.benchmark in ("pope", "all") and bool(packaged or not args.questions)


def _of_coco(args: Any) -> bool:
    return args.benchmark in ("pope", "chair", "all") and args.data.startswith("coco") and not args.questions


WITHOUT_BEAMS = "add --sample, which goes without beams, or leave it out"
SERVED = "--server has the model already; leave it out"
RULES = (
    Rule("--temperature", _samples, WITHOUT_BEAMS),
    Rule("--top-p", _samples, WITHOUT_BEAMS),
    Rule("--split", _has_splits, "only POPE has splits, and a file of --questions is a single split; leave it out"),
    Rule(
        "--build",
        lambda args: _own_questions(args) and _of_coco(args),
        "it is for POPE with --data coco:DIR; leave it out",
    ),
    Rule(
        "--labels",
        lambda args: _own_questions(args) and _of_coco(args),
        "it is for POPE's own questions about COCO; leave it out",
    ),
    Rule("--ids", _of_coco, "it is for pope and chair with --data coco:DIR; leave it out"),
    Rule("--scorer", lambda args: args.benchmark != "chair", "captions are judged by --variant; leave it out"),
    Rule("--variant", _asks("chair", "all", "amber"), "it is for captions (chair and amber); leave it out"),
    Rule("--drop-incomplete", _asks("chair", "all"), "it is for chair; leave it out"),
    Rule("--dtype", lambda args: not args.server or args.dtype == "auto", SERVED),
    Rule("--device", lambda args: not args.server, SERVED),
    Rule("--device-map", lambda args: not args.server, SERVED),
    Rule("--device", lambda args: not args.device_map, "--device-map places the model; leave one of them out"),
)


def check(args: argparse.Namespace) -> None:
    """Raise VlmFixError for a given option without effect. Options that were not given are None or False."""
    for option, acts, remedy in RULES:
        given = getattr(args, option.lstrip("-").replace("-", "_"))
        if given not in (None, False) and not acts(args):
            raise VlmFixError(f"{option} has no effect on this run: {remedy}.")
    if args.benchmark == "chair" and "{question}" in (args.prompt or ""):
        raise VlmFixError("--prompt with {question} is for questions: give chair a prompt for captions.")
    if args.scorer == "official" and args.benchmark == "hallusion":
        raise VlmFixError(
            "--scorer official of hallusion is GPT-4, which is not called: take vlmevalkit or leave it out."
        )
    if args.scorer == "official" and args.benchmark == "amber" and args.data.startswith("picto"):
        raise VlmFixError(
            "--scorer official of amber takes Yes and No alone, and Picto's models write yes and no: take ours."
        )
