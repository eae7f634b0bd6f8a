"""vlm-fix eval: measure a model with and without methods."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.options import key_values, read_file
from vlm_fix.eval.scorers.registry import BENCHMARKS
from vlm_fix.eval.settings import Settings

from . import effect
from .common import LABELS, SCORERS, VARIANTS, add, add_images, add_json, add_model, add_weights, check_place, console
from .config import arguments

TRACKERS = ("trackio", "wandb")
ABOUT = """methods: names from `vlm-fix methods`, with settings; commas separate runs, + stacks methods in one run:
  --method pai:alpha=0.2,gamma=1.1,hiprune:keep=32+vcd     two runs: pai, and hiprune together with vcd
  --method @vlm-fix.yaml                                   what `vlm-fix recommend` found for this model

data: picto | picto:test | picto:shift | picto:style (rendered on the fly), or coco:DIR with DIR/val2014/*.jpg (or
  DIR/*.jpg); questions and ground truth of COCO images are in the package, other images need
  DIR/annotations/instances_*.json. amber:DIR (amber runs on picto too), mme:DIR and hallusion:DIR hold the images of
  these benchmarks; `--scorer official` is then the benchmark's own (hallusion: vlmevalkit).

DIR of --output gets results.json, table.md, figure.png, samples.jsonl with every answer on a line, and run.yaml with every
option: `vlm-fix eval --config DIR/run.yaml` repeats the run."""


def add_to(commands: Any) -> None:
    parser = add(commands, "eval", "measure a model with and without methods", run, ABOUT)
    parser.add_argument("--config", metavar="FILE", help="YAML of options by name; what is typed here comes first")
    parser.add_argument(
        "benchmark",
        nargs="?",
        choices=(*(name for name, made in BENCHMARKS.items() if made.asked), "all"),
        help="all is pope and chair",
    )
    what = parser.add_argument_group("what to run")
    add_model(what)
    what.add_argument("--revision", metavar="REV", help="branch, tag or commit of the model's repository")
    what.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the model")
    what.add_argument("--model-args", metavar="A=1,B=2", help="further arguments of from_pretrained, or a JSON object")
    what.add_argument("--method", default="", metavar="A,B+C", help="runs beside the baseline, see below")
    what.add_argument("--calibration", action="append", metavar="FILE", help="of vlm-fix calibrate; may be repeated")
    what.add_argument("--data", default="picto", metavar="DATA", help="picto[:SPLIT[+LOOK]] or coco:DIR (picto:shift)")
    add_images(what)
    what.add_argument("--split", metavar="A,B", help="POPE splits (random,popular,adversarial)")
    what.add_argument("--build", action="store_true", help="make POPE questions from the annotations of coco:DIR")
    what.add_argument(
        "--questions", metavar="A,B", help="POPE files of other data, or aokvqa, gqa; images by name in coco:DIR"
    )
    what.add_argument("--prompt", metavar="TEXT", help="other caption prompt, or POPE prompt around {question}")
    what.add_argument("--scorer", choices=SCORERS, help="of yes/no answers (official)")
    what.add_argument("--labels", choices=LABELS, help="of POPE on COCO; repope: corrected (both)")
    what.add_argument("--variant", choices=VARIANTS, help="CHAIR variant (nltk where its data are found)")
    what.add_argument("--drop-incomplete", action="store_true", help="CHAIR: drop a cut-off last sentence")

    how = parser.add_argument_group("how to generate")
    how.add_argument(
        "--batch-size", type=_size, default=8, metavar="B", help="samples per batch, or auto (%(default)s)"
    )
    how.add_argument("--seed", type=int, default=0, metavar="S", help="of data, sampling and bootstrap (%(default)s)")
    how.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (questions 16, captions 512)")
    how.add_argument("--sample", action="store_true", help="sample instead of greedy decoding")
    how.add_argument("--temperature", type=float, metavar="T", help="with --sample (1.0)")
    how.add_argument("--top-p", type=float, metavar="P", help="with --sample (1.0)")
    how.add_argument("--engine", choices=("hf", "vllm"), default="hf", help="generate, or vLLM (%(default)s)")
    how.add_argument(
        "--server", metavar="URL,URL", help="servers that run already: each run asks the first that can answer"
    )
    how.add_argument("--num-beams", type=int, default=1, metavar="N", help="beam search (%(default)s = greedy)")
    how.add_argument("--gen-kwargs", metavar="A=1,B=2", help="further arguments of generate, or a JSON object")
    add_weights(how, device=None)
    how.add_argument("--device-map", choices=("auto", "balanced", "sequential"), help="spread the model over all GPUs")

    honest = parser.add_argument_group("what keeps it honest")
    honest.add_argument(
        "--seeds", default="", metavar="A,B,C", help="seeds of sampling and of random methods: mean and sd (--seed)"
    )
    honest.add_argument(
        "--controls", action="store_true", help="runs that a method has to beat, at the methods' budget"
    )
    honest.add_argument(
        "--equal-compute", action="store_true", help="beams for as many passes per token as a contrast method takes"
    )
    honest.add_argument(
        "--compare-published",
        action="store_true",
        help="set what papers report beside this run, and where setups differ",
    )

    kept = parser.add_argument_group("what to keep")
    kept.add_argument("--output", metavar="DIR", help="folder for the results (runs/DATE-TIME)")
    kept.add_argument("--resume", action="store_true", help="continue an interrupted run in --output")
    kept.add_argument("--log", choices=TRACKERS, help="log the results there as well (its package must be installed)")
    add_json(kept, "print results.json instead of tables")


def run(args: argparse.Namespace) -> None:
    args = _with_file(args)
    if args.resume and not args.output:
        raise VlmFixError("--resume needs --output DIR, the folder of the run to continue.")
    effect.check(args)
    from datetime import datetime

    from vlm_fix.eval.report import published, tracking
    from vlm_fix.eval.report import tables as report
    from vlm_fix.eval.run import loading
    from vlm_fix.eval.run.runner import Team, evaluate

    if not args.server:
        loading.check_placing(args.model, args.device_map, args.trust_remote_code)
    tracker = tracking.load(args.log) if args.log else None
    team = Team()
    args.output = args.output or str(team.share(Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")))
    check_place(args.output, folder=True)
    results = evaluate(_settings(args), args.output, resume=args.resume)
    if not team.first:
        return
    report.write(results, Path(args.output))
    if tracker:
        tracking.log(tracker, results, Path(args.output).name)
    beside = published.compare(results) if args.compare_published else []
    if args.json:
        print(json.dumps(results | ({"published": beside} if args.compare_published else {}), indent=2))
        return
    report.show(results, Path(args.output))
    if beside:
        lines = [list(line.values()) for line in beside]
        console().print(published.render(published.COMPARED, lines, "Beside what papers report (baseline > method)"))
    elif args.compare_published:
        print(
            "No paper's figure is kept for a method and benchmark of this run: `vlm-fix published` lists what there is."
        )


def _settings(args: argparse.Namespace) -> Settings:
    """Return the options as the settings of an evaluation."""
    from vlm_fix.registry import split_methods

    names = {field.name for field in dataclasses.fields(Settings)}
    given = {key: value for key, value in vars(args).items() if key in names and value is not None}
    given["calibration"] = tuple(args.calibration or ())
    given["questions"] = _parts(args.questions)
    given["model_args"] = key_values(args.model_args, "--model-args")
    given["gen_kwargs"] = key_values(args.gen_kwargs, "--gen-kwargs")
    if args.split is not None:
        given["splits"] = _parts(args.split)
    try:
        given["seeds"] = tuple(map(int, _parts(args.seeds)))
    except ValueError:
        raise VlmFixError(f"--seeds {args.seeds!r} must be whole numbers, such as 0,1,2.") from None
    return Settings(**given, methods=tuple(tuple(stack) for stack in split_methods(args.method)))


def _with_file(args: argparse.Namespace) -> argparse.Namespace:
    """Return the options of --config with those of the command line, which come first."""
    if args.config:
        options = read_file(args.config)
        if args.benchmark:
            options.pop("benchmark", None)
        typed = args.argv[args.argv.index("eval") + 1 :]
        args.parser.source = args.config  # what was typed has been parsed before, so an error is the file's
        parsed = args.parser.parse_args([*arguments(args.parser, options, args.config), *typed])
        args.__dict__.update(parsed.__dict__)
    if not args.benchmark:
        raise VlmFixError("vlm-fix eval needs a benchmark: name one, such as pope, here or in --config.")
    return args


def _size(text: str) -> int | str:
    if text != "auto" and not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give a whole number, or auto")
    return text if text == "auto" else int(text)


def _parts(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
