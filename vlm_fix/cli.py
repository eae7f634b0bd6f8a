"""The command `vlm-fix`: evaluate, score, list methods and models, the demo, render and train Picto.

Everything heavy is imported inside the command that needs it, so that `--help` and `score` start at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from .errors import VlmFixError

SCORERS = ("official", "opera", "vcd", "lmms", "vlmevalkit", "ours")
EXAMPLES = {
    "vlm-fix": """examples:
  vlm-fix eval pope --method var                           bundled model and data: runs anywhere, on a CPU
  vlm-fix eval all --method var,vhr,pai,vcd,hiprune --limit 50 --output runs/first
  vlm-fix eval chair --model llava-hf/llava-1.5-7b-hf --data coco:/data/coco --method pai,vcd
  vlm-fix score chair captions.jsonl --variant pattern
  vlm-fix methods""",
    "eval": """methods: names from `vlm-fix methods`, with settings; commas separate runs, + stacks methods in one run:
  --method pai:alpha=0.2,gamma=1.1,hiprune:keep=32+vcd     two runs: pai, and hiprune together with vcd

data: picto | picto:test | picto:shift | picto:style (rendered on the fly), or coco:DIR with DIR/val2014/*.jpg (or
  DIR/*.jpg); questions and ground truth of COCO images are in the package, other images need
  DIR/annotations/instances_*.json. amber:DIR (amber runs on picto too), mme:DIR and hallusion:DIR hold the images of
  these benchmarks; `--scorer official` is then the benchmark's own (hallusion: vlmevalkit).

DIR of --output gets results.json, table.md, figure.png and samples.jsonl, every answer on a line.""",
    "report": """The page loads nothing from anywhere and holds tables, figures and answers side by side. A Markdown file
with the lines <!-- leaderboard --> and <!-- /leaderboard --> keeps all else that is in it.

  vlm-fix report runs/first runs/second --out report.html
  vlm-fix report results/*/results.json --markdown docs/leaderboard.md""",
    "methods": """examples:
  vlm-fix methods              every method in a line
  vlm-fix methods pai vcd      paper, settings with defaults and ranges""",
    "published": """the mark after a source says how the figure was read:
  C  in the official code's repository and its paper    P  in the paper's text
  N  in a table or note elsewhere: a lead, not a fact

  vlm-fix published --method vcd,pai --benchmark chair
  vlm-fix eval pope --method vcd --compare-published""",
    "score": """examples:
  vlm-fix score pope coco_pope_random.json answers.jsonl --scorer vcd
  vlm-fix score chair captions.jsonl --variant nltk --json""",
    "calibrate": """METHOD is a name from `vlm-fix methods`, with settings if you like: iri, iri:noise=5. What a method
finds for itself is found first; --search then tries values of any setting. FILE is read by
wrap(model, METHOD, calibration=FILE), by `vlm-fix eval --calibration FILE`, and, as calibration/METHOD.json in the
folder of a checkpoint, without being named.

examples:
  vlm-fix calibrate iri --out iri.json
  vlm-fix calibrate zerotuning --limit 200
  vlm-fix calibrate pai --search "alpha=0.1|0.2|0.5" --search "layers=2-|3-" --data coco:/data/train2014
  vlm-fix eval pope --method iri --calibration iri.json""",
    "lmms-tasks": """examples:
  lmms-eval --model vlm_fix_llava_hf --model_args "pretrained=llava-hf/llava-1.5-7b-hf,method=pai:alpha=0.2;gamma=1.1" \\
    --tasks pope_official --include_path $(vlm-fix lmms-tasks)
  vlm-fix lmms-tasks --out tasks --data picto:shift --limit 100     # tasks pope_picto, pope_picto_random, ...
  lmms-eval --model vlm_fix_llava_hf --model_args pretrained=picto-llava,method=var+vcd,dtype=float32 --device cpu \\
    --tasks pope_picto --include_path tasks

models: vlm_fix_llava_hf, vlm_fix_qwen2_5_vl, vlm_fix_qwen3_vl; in method, + stacks and ; stands for a comma.""",
    "vlmevalkit": """examples:
  vlm-fix vlmevalkit VLMEvalKit --method pai:alpha=0.2 --model llava_next_vicuna_7b --data POPE""",
    "picto": """examples:
  vlm-fix picto render picto-shift --scenes 500 --split shift --seed 0
  vlm-fix picto train --seed 0 --out my-picto""",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see `{self.prog} --help`.\n")


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)

    def add(group: Any, name: str, help: str, run: Any = None) -> argparse.ArgumentParser:
        made = group.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=EXAMPLES.get(name),
            formatter_class=layout,
        )
        if run:
            made.set_defaults(run=run)
        return made

    parser = _Parser(
        "vlm-fix",
        description="Make pretrained vision-language models hallucinate less, without training, and measure it.",
        epilog=EXAMPLES["vlm-fix"],
        formatter_class=layout,
    )
    parser.add_argument("--version", action="version", version=f"vlm-fix {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    evaluate = add(commands, "eval", "measure a model with and without methods", _eval)
    evaluate.add_argument(
        "benchmark", choices=("pope", "chair", "all", "amber", "mme", "hallusion"), help="all is pope and chair"
    )
    asked = evaluate.add_argument_group("what to run")
    asked.add_argument(
        "--model", default="picto-llava", metavar="NAME", help="folder or Hugging Face name (%(default)s)"
    )
    asked.add_argument("--method", default="", metavar="A,B+C", help="runs beside the baseline, see below")
    asked.add_argument("--calibration", action="append", metavar="FILE", help="of vlm-fix calibrate; may be repeated")
    asked.add_argument("--data", default="picto", metavar="DATA", help="picto[:SPLIT] or coco:DIR (picto:shift)")
    asked.add_argument("--ids", metavar="FILE", help="image ids to use, one a line (coco)")
    asked.add_argument("--limit", type=int, metavar="N", help="number of images (500)")
    asked.add_argument("--split", default="random,popular,adversarial", metavar="A,B", help="POPE splits (%(default)s)")
    asked.add_argument("--build", action="store_true", help="make POPE questions from the annotations of coco:DIR")
    asked.add_argument("--questions", metavar="A,B", help="POPE files of other data, images by name in coco:DIR")
    asked.add_argument("--prompt", metavar="TEXT", help="other caption prompt, or POPE prompt around {question}")
    asked.add_argument("--scorer", choices=SCORERS, default="official", help="of yes/no answers (%(default)s)")
    asked.add_argument("--variant", choices=("nltk", "pattern"), help="CHAIR variant (nltk where its data are found)")
    asked.add_argument("--drop-incomplete", action="store_true", help="CHAIR: drop a cut-off last sentence")
    how = evaluate.add_argument_group("how to generate")
    how.add_argument("--batch-size", type=int, default=8, metavar="B", help="samples per batch (%(default)s)")
    how.add_argument("--seed", type=int, default=0, metavar="S", help="of data, sampling and bootstrap (%(default)s)")
    how.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (questions 16, captions 512)")
    how.add_argument("--sample", action="store_true", help="sample instead of greedy decoding")
    how.add_argument("--temperature", type=float, default=1.0, metavar="T", help="with --sample (%(default)s)")
    how.add_argument("--top-p", type=float, default=1.0, metavar="P", help="with --sample (%(default)s)")
    how.add_argument("--num-beams", type=int, default=1, metavar="N", help="beam search (%(default)s = greedy)")
    how.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights"
    )
    how.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda or cuda:N (%(default)s)")
    how.add_argument("--device-map", choices=("auto", "balanced", "sequential"), help="spread the model over all GPUs")
    honest = evaluate.add_argument_group("what keeps it honest")
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
    kept = evaluate.add_argument_group("what to keep")
    kept.add_argument("--output", metavar="DIR", help="folder for the results (runs/DATE-TIME)")
    kept.add_argument("--resume", action="store_true", help="continue a killed run in --output")
    kept.add_argument("--json", action="store_true", help="print results.json instead of tables")

    found = add(commands, "calibrate", "find a method's settings for a model on labelled questions", _calibrate)
    found.add_argument("method", metavar="METHOD", help="see below")
    found.add_argument(
        "--model", default="picto-llava", metavar="NAME", help="folder or Hugging Face name (%(default)s)"
    )
    found.add_argument("--data", default="picto:train", metavar="DATA", help="picto:SPLIT or coco:DIR (%(default)s)")
    found.add_argument(
        "--limit", type=int, default=300, metavar="N", help="questions to find with, and to score (%(default)s)"
    )
    found.add_argument("--seed", type=int, default=0, metavar="S", help="of data and noise (%(default)s)")
    found.add_argument(
        "--search", action="append", default=[], metavar="NAME=A|B", help="values to try; repeat for combinations"
    )
    found.add_argument("--out", metavar="FILE", help="where to write (METHOD.json)")
    found.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights"
    )
    found.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda or cuda:N (%(default)s)")
    found.add_argument("--json", action="store_true", help="print the file instead of a table")

    scoring = add(commands, "score", "score answers or captions that you have")
    kinds = scoring.add_subparsers(metavar="BENCHMARK", required=True)
    one = add(kinds, "pope", "score POPE answers", _score_pope)
    one.add_argument("questions", metavar="QUESTIONS", help="JSON lines or array: question_id, image, text, label")
    one.add_argument("answers", metavar="ANSWERS", help="JSON lines: question_id, text or answer")
    one.add_argument("--scorer", choices=SCORERS, default="official", help="(%(default)s)")
    two = add(kinds, "chair", "score captions with CHAIR", _score_chair)
    two.add_argument("captions", metavar="CAPTIONS", help="JSON lines or array: image_id, caption")
    two.add_argument("--variant", choices=("nltk", "pattern"), default="nltk", help="(%(default)s)")
    two.add_argument("--drop-incomplete", action="store_true", help="drop a cut-off last sentence first")
    two.add_argument("--ground-truth", metavar="FILE", help="objects per image; COCO train+val2014 is in the package")

    three = add(kinds, "amber", "score AMBER answers", _score_amber)
    three.add_argument("answers", metavar="ANSWERS", help="JSON array or lines: id, response")
    three.add_argument("--scorer", choices=SCORERS, default="official", help="(%(default)s)")
    three.add_argument(
        "--variant", choices=("nltk", "pattern"), default="nltk", help="how nouns are found (%(default)s)"
    )

    four = add(kinds, "mme", "score MME answers", _score_mme)
    four.add_argument("answers", metavar="DIR", help="folder with TASK.txt: image, question, truth, answer with tabs")
    four.add_argument("--scorer", choices=SCORERS, default="official", help="(%(default)s)")
    five = add(kinds, "hallusion", "score HallusionBench answers", _score_hallusion)
    five.add_argument("answers", metavar="ANSWERS", help="HallusionBench.json with model_prediction in each row")
    five.add_argument(
        "--scorer", choices=SCORERS, default="vlmevalkit", help="%(default)s; official reads GPT-4's marks in the file"
    )

    papers = add(commands, "published", "list what papers report, with sources and their own baselines", _published)
    papers.add_argument("--method", default="", metavar="A,B", help="only these methods")
    papers.add_argument("--benchmark", default="", metavar="NAME", help="only this benchmark, such as pope or chair")
    papers.add_argument("--model", default="", metavar="TEXT", help="only models whose name contains this")
    page = add(commands, "report", "make one HTML page, or a Markdown table, of evaluations", _report)
    page.add_argument("folders", nargs="+", metavar="DIR", help="folders that `vlm-fix eval --output` made")
    page.add_argument("--out", metavar="FILE", help="the page (report.html, unless --markdown is given alone)")
    page.add_argument(
        "--markdown", metavar="FILE", help="the short table; replaces what is between the marks, see below"
    )
    page.add_argument("--samples", type=int, default=6, metavar="N", help="captions and questions shown (%(default)s)")
    methods = add(commands, "methods", "list the methods, or what is known of some: paper and settings", _methods)
    methods.add_argument("names", nargs="*", metavar="NAME", help="methods to tell more of (all, a line each)")
    models = add(commands, "models", "list the model families", _models)
    for each in (one, two, three, four, five, papers, methods, models):
        each.add_argument("--json", action="store_true", help="for machines")

    bench = add(commands, "bench", "time methods against the unwrapped model, on random weights", _bench)
    bench.add_argument("kind", choices=("attention", "decode", "prune"), help="which methods")
    bench.add_argument("--shape", default="small", metavar="S", help="small, small-qwen, llava-1.5-7b, qwen2.5-vl-7b")
    bench.add_argument("--method", default="", metavar="A,B+C", help="only these (all of the kind)")
    bench.add_argument("--new-tokens", type=int, default=32, metavar="N", help="tokens to time (%(default)s)")
    bench.add_argument("--rounds", type=int, default=3, metavar="N", help="(%(default)s)")
    bench.add_argument("--keep", default="192,64", metavar="N,M", help="visual tokens kept, prune only (%(default)s)")
    bench.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu or cuda (%(default)s)")
    bench.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    bench.add_argument("--seed", type=int, default=0, metavar="S", help="of the weights and the prompt (%(default)s)")
    bench.add_argument("--output", metavar="FILE", help="also write the figures as JSON")
    bench.add_argument("--json", action="store_true", help="print the JSON instead of the table")

    lmms = add(commands, "lmms-tasks", "print the folder of tasks for lmms-eval's --include_path", _lmms_tasks)
    lmms.add_argument("--out", metavar="DIR", help="first write tasks there, over --data")
    lmms.add_argument("--data", default="picto:shift", metavar="DATA", help="picto:SPLIT or coco:DIR (%(default)s)")
    lmms.add_argument("--ids", metavar="FILE", help="image ids to use, one a line (coco)")
    lmms.add_argument("--limit", type=int, metavar="N", help="number of images (500)")
    lmms.add_argument("--seed", type=int, default=0, metavar="S", help="of the data (%(default)s)")

    kit = add(commands, "vlmevalkit", "run VLMEvalKit with a method", _vlmevalkit)
    kit.add_argument("folder", metavar="DIR", help="a clone of VLMEvalKit; all else goes to its run.py")
    kit.add_argument("--method", required=True, metavar="A+B", help="one method or a stack")
    kit.add_argument("--calibration", default="", metavar="FILE", help='of vlm-fix calibrate; several with ";" between')

    demo = add(commands, "demo", "compare methods side by side in a web page", _demo)
    demo.add_argument(
        "--model", default="picto-llava", metavar="NAME", help="folder or Hugging Face name (%(default)s)"
    )
    demo.add_argument("--host", default="127.0.0.1", metavar="ADDR", help="address to serve on (%(default)s)")
    demo.add_argument("--port", type=int, metavar="P", help="first free one from 7860 up")
    demo.add_argument("--share", action="store_true", help="also give the page a public address, through Gradio")
    demo.add_argument("--mcp", action="store_true", help="also serve describe, ask and compare as MCP tools")

    picto = add(commands, "picto", "render or train the bundled world")
    jobs = picto.add_subparsers(metavar="JOB", required=True)
    render = add(jobs, "render", "write scenes as a COCO-format folder", _render)
    render.add_argument("out", metavar="OUT")
    render.add_argument("--scenes", type=int, default=500, metavar="N", help="(%(default)s)")
    render.add_argument("--split", default="test", metavar="SPLIT", help="train, test, shift or style (%(default)s)")
    render.add_argument("--seed", type=int, default=0, metavar="S", help="(%(default)s)")
    train = jobs.add_parser("train", help="train picto-llava again (vlm-fix picto train --help)", add_help=False)
    train.set_defaults(run=_train)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 2 after a user's error (one sentence on stderr) or 130 when interrupted."""
    args, rest = _parser().parse_known_args(argv)
    if rest and args.run not in (_train, _vlmevalkit):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            for name in ("out", "markdown", "output"):
                _check_place(getattr(args, name, None), args)
            args.run(args)
    except VlmFixError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed: pip install '.[eval]' in the clone of vlm-fix.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        where = getattr(args, "output", None)
        print(f"stopped; continue with --resume --output {where}" if where else "stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vlm-fix methods | head`
        sys.stderr.close()
    except OSError as error:
        if error.errno is None:
            raise
        place = error.filename or getattr(args, "output", None) or "output"
        hint = "; what is done can be continued with --resume" if args.run is _eval else ""
        print(f"error: {place}: {error.strerror}: give a place that can be written{hint}.", file=sys.stderr)
        return 2
    return 0


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """What the package itself warns of, as a sentence; a library's warning with where it comes from."""
    if category is UserWarning and "vlm_fix" in Path(filename).parts:
        print(f"warning: {message}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def _check_place(place: str | None, args: argparse.Namespace) -> None:
    """A result that cannot be written must not surface after the work is done."""
    if not place:
        return
    path = Path(place)
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    folder = existing if existing.is_dir() else existing.parent
    if (existing != path and not existing.is_dir()) or not os.access(folder, os.W_OK):
        raise VlmFixError(f"{place} cannot be written: give a place in a folder that you may write to.")
    if path.is_dir() and args.run in (_calibrate, _bench, _report):
        raise VlmFixError(f"{place} is a folder: give a file in it.")


def _eval(args: argparse.Namespace) -> None:
    from .registry import split_methods

    if args.resume and not args.output:
        raise VlmFixError("--resume needs --output DIR, the folder of the run to continue.")
    from .eval import report
    from .eval.runner import Settings, Team, evaluate

    team = Team()
    args.output = args.output or str(team.share(Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")))
    _check_place(args.output, args)

    names = {field.name for field in dataclasses.fields(Settings)}
    given = {key: value for key, value in vars(args).items() if key in names}
    given["calibration"] = tuple(args.calibration or ())
    given["questions"] = tuple(part.strip() for part in (args.questions or "").split(",") if part.strip())
    try:
        given["seeds"] = tuple(int(part) for part in args.seeds.split(",") if part.strip())
    except ValueError:
        raise VlmFixError(f"--seeds {args.seeds!r} must be whole numbers, such as 0,1,2.") from None
    settings = Settings(
        **given,
        methods=tuple(tuple(stack) for stack in split_methods(args.method)),
        splits=tuple(part.strip() for part in args.split.split(",") if part.strip()),
    )
    results = evaluate(settings, args.output, resume=args.resume)
    if not team.first:
        return
    from .eval import published

    beside = published.compare(results) if args.compare_published else []
    if args.json:
        print(json.dumps(results | ({"published": beside} if args.compare_published else {}), indent=2))
        return
    report.show(results, Path(args.output))
    if beside:
        lines = [list(line.values()) for line in beside]
        _console().print(published.render(published.COMPARED, lines, "Beside what papers report (baseline > method)"))
    elif args.compare_published:
        print(
            "No paper's figure is kept for a method and benchmark of this run: `vlm-fix published` lists what there is."
        )


def _report(args: argparse.Namespace) -> None:
    from .eval import page
    from .eval.store import write_atomic

    if args.markdown:
        page.save_markdown(page.leaderboard(args.folders), Path(args.markdown))
        print(args.markdown)
    if args.out or not args.markdown:
        out = Path(args.out or "report.html")
        _check_place(str(out), args)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, page.page(args.folders, args.samples))
        print(out)


def _published(args: argparse.Namespace) -> None:
    from .eval import published

    rows = published.select(args.method, args.benchmark, args.model)
    if args.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    title = "What papers report, each figure with the baseline of its own table; C, P, N: see --help"
    _console().print(published.render(published.HEADS, [published.cells(row) for row in rows], title))


def _calibrate(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from .eval.calibrate import calibrate, parse_search

    out = Path(args.out or f"{args.method.partition(':')[0]}.json")
    _check_place(str(out), args)
    search, stderr = parse_search(args.search), Console(stderr=True)
    with Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=stderr,
        disable=not stderr.is_terminal,
    ) as bar:
        job = bar.add_task("", total=1.0)

        def progress(label: str, share: float) -> None:
            bar.update(job, description=label, completed=share)

        result = calibrate(
            args.method, args.model, args.data, args.limit, args.seed, search, args.dtype, args.device, progress
        )
    made = result.calibration
    made.write(out)
    if args.json:
        print(out.read_text(), end="")
        return
    for options, accuracy in result.tried:
        print(f"{','.join(f'{k}={v}' for k, v in options.items()):<40} {accuracy:.3f} right")
    for name, value in made.found.items():
        print(f"{made.method}: {name} = {_value(value)}")
    score = made.score
    print(
        f"held-out accuracy {score['accuracy_before']:.3f} -> {score['accuracy_after']:.3f} on {score['questions']} "
        f"questions ({score['mended']} mended, {score['broken']} broken, McNemar p {score['mcnemar_p']:.2g}), "
        f"yes-ratio {score['yes_ratio_before']:.3f} -> {score['yes_ratio_after']:.3f}, "
        f"log-probability of the right answer {score['sureness_before']:.4f} -> {score['sureness_after']:.4f}"
    )
    if result.tried:
        print(
            "searched on yes/no questions alone: look at captions too (vlm-fix eval chair --calibration) before using it"
        )
    print(f"written to {out}")


def _score_pope(args: argparse.Namespace) -> None:
    from .eval import pope, pope_data

    result = pope.score(pope_data.load_questions(args.questions), pope_data.load_answers(args.answers), args.scorer)
    _print(args, "POPE", result)


def _score_chair(args: argparse.Namespace) -> None:
    from .eval import chair, chair_data

    truth = chair_data.ground_truth(args.ground_truth or "coco", args.variant)
    captions = chair_data.load_captions(args.captions)
    if args.drop_incomplete:
        captions = [caption._replace(text=chair_data.whole_sentences(caption.text)) for caption in captions]
    _print(args, "CHAIR", chair.score(captions, truth, args.variant))


def _score_amber(args: argparse.Namespace) -> None:
    from .eval import amber, amber_file

    found = amber_file.score_file(args.answers, args.scorer, args.variant)
    whole = {"amber_score": amber.amber_score(found)} if {"captions", "questions"} <= found.keys() else {}
    figures = {part: result.to_dict() for part, result in found.items()}
    if args.scorer == "official":
        for part, result in found.items():
            figures[part]["printed"] = amber_file.printed(result, 0.001 if part == "existence" else 0.0001)
    _print_parts(args, "AMBER", figures, whole)


def _score_mme(args: argparse.Namespace) -> None:
    from .eval import mme

    questions, answers = mme.load_results(args.answers)
    found = mme.score(answers, questions, args.scorer)
    _print_parts(args, "MME", {part: result.to_dict() for part, result in found.items()}, {})


def _score_hallusion(args: argparse.Namespace) -> None:
    from .eval import hallusion

    questions, answers = hallusion.load_answers(args.answers, args.scorer)
    found = hallusion.score(answers, questions, args.scorer)
    _print_parts(args, "HallusionBench", {part: result.to_dict() for part, result in found.items()}, {})


def _print_parts(args: argparse.Namespace, title: str, found: dict[str, Any], whole: dict[str, float]) -> None:
    """The figures of a benchmark's parts, and of the whole."""
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


def _print(args: argparse.Namespace, title: str, result: Any) -> None:
    """A score, without its rows unless --json."""
    everything = dataclasses.asdict(result)
    if args.json:
        print(json.dumps(everything, indent=2, default=str))
        return
    for name, value in everything.items():
        if isinstance(value, float):
            print(f"{title}  {name:<20} {value:.5f}")
        elif isinstance(value, int | str):
            print(f"{title}  {name:<20} {value}")


def _settings(method: Any) -> list[dict[str, Any]]:
    """The settings of a method class: its dataclass fields."""
    rows = []
    for field in dataclasses.fields(method):
        default = None if field.default is dataclasses.MISSING else field.default
        meta = field.metadata
        low, high = ("" if meta.get(end) is None else f"{meta[end]:g}" for end in ("low", "high"))
        span = f"above {low}" if meta.get("open") and low else f"{low} to {high}" if low and high else ""
        span = span or (f"at least {low}" if low else f"at most {high}" if high else "")
        rows.append(
            {
                "name": field.name,
                "default": default,
                "help": meta.get("help", ""),
                "range": ", ".join(map(str, meta.get("choices") or ())) or span,
            }
        )
    return rows


def _methods(args: argparse.Namespace) -> None:
    from . import list_methods
    from .registry import get_method

    chosen = [get_method(name) for name in args.names] or list_methods()
    rows: list[dict[str, Any]] = [
        {
            "name": method.name,
            "kind": method.kind,
            "paper": method.paper,
            "about": (method.__doc__ or "").strip().splitlines()[0],
            "parameters": _settings(method),
        }
        for method in chosen
    ]
    if args.json:
        print(json.dumps(rows, indent=2, default=str))
        return
    from rich.markup import escape

    if not args.names:
        table = _table("kind", "method", "what it does", gap=0)
        for row, before in zip(rows, [{"kind": ""}, *rows], strict=False):
            kind = row["kind"] if row["kind"] != before["kind"] else ""
            table.add_row(f"[dim]{kind}[/dim]", f"[bold]{row['name']}[/bold]", escape(row["about"]))
        _console().print(table)
        print("vlm-fix methods NAME: paper and settings; docs/methods.md: formula, cost and what it does on Picto")
        return
    table = _table("method", "what it does, paper, settings with defaults")
    for row in rows:
        lines = [escape(row["about"])] + [f"[dim]{escape(row['paper'])}[/dim]"] * bool(row["paper"])
        for p in row["parameters"]:
            told = " ".join(filter(None, (p["help"].replace("None:", "auto:"), p["range"] and f"({p['range']})")))
            lines.append(f"[cyan]{escape(p['name'])}[/cyan]={escape(_value(p['default']))}  [dim]{escape(told)}[/dim]")
        table.add_row(f"[bold]{row['name']}[/bold]\n[dim]{row['kind']}[/dim]", "\n".join(lines))
    _console().print(table)


def _value(value: Any) -> str:
    """A default as it is written in a spec."""
    if value is None:
        return "auto"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "|".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _models(args: argparse.Namespace) -> None:
    from .families import FAMILIES

    rows: list[dict[str, Any]] = [
        {"name": family.name, "model_types": list(family.model_types), "tested": family.tested} for family in FAMILIES
    ]
    if args.json:
        print(json.dumps(rows, indent=2, default=str))
        return
    table = _table("family", "model_type in config.json", "tested", gap=0)
    for row in rows:
        table.add_row(row["name"], ", ".join(row["model_types"]), str(row["tested"]))
    _console().print(table)


def _table(*columns: str, gap: int = 1) -> Any:
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE_HEAD, show_lines=False, padding=(0, 2, gap, 0))


def _console() -> Any:
    """As wide as the terminal, at most 100 columns."""
    from rich.console import Console

    console = Console(highlight=False)
    console.width = min(console.width, 100) if console.is_terminal else 100
    return console


def _render(args: argparse.Namespace) -> None:
    from .eval import picto

    if args.scenes < 1:
        raise VlmFixError(f"--scenes is {args.scenes}: give a whole number of at least 1.")
    print(picto.render(args.out, scenes=args.scenes, split=args.split, seed=args.seed))


def _lmms_tasks(args: argparse.Namespace) -> None:
    from .eval import lmms

    if args.out:
        from .eval.runner import Settings

        settings = Settings("pope", data=args.data, ids=args.ids, limit=args.limit, seed=args.seed)
        print(lmms.write_tasks(args.out, settings))
    else:
        print(lmms.TASKS)


def _vlmevalkit(args: argparse.Namespace) -> None:
    from .eval.vlmevalkit import launch

    launch(args.folder, args.method, args.rest, args.calibration)


def _demo(args: argparse.Namespace) -> None:
    try:
        from .demo.app import launch
    except ModuleNotFoundError as error:
        raise VlmFixError(f"the demo needs {error.name}: pip install '.[demo]' in the clone of vlm-fix.") from None
    launch(args.model, args.host, args.port, args.share, args.mcp)


def _bench(args: argparse.Namespace) -> None:
    import os

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler announces itself otherwise
    from rich.progress import Progress

    from .eval import bench
    from .registry import split_methods

    try:
        keep = tuple(float(part) for part in args.keep.split(","))
    except ValueError:
        raise VlmFixError(f"--keep {args.keep!r} is not a list of counts or shares such as 192,64.") from None
    from rich.console import Console

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"bench {args.kind}", total=None)
        results = bench.run(
            args.kind,
            args.shape,
            ["+".join(stack) for stack in split_methods(args.method)],
            device=args.device,
            dtype=args.dtype,
            new_tokens=args.new_tokens,
            rounds=args.rounds,
            keep=keep,
            seed=args.seed,
            tick=lambda total: progress.update(task, total=total, advance=1),
        )
    if args.output:
        bench.write(results, Path(args.output))
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        _console().print(bench.table(results))


def _train(args: argparse.Namespace) -> None:
    from .eval.picto.train import main as train

    train(args.rest)


if __name__ == "__main__":
    raise SystemExit(main())
