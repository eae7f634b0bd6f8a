"""The command line `vlm-fix`, one file per command: each adds its parser and runs it.

Heavy modules are imported inside the commands that need them, so that `--help` and `score` start quickly.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from vlm_fix.errors import VlmFixError

from . import (
    bench,
    calibrate,
    compare,
    demo,
    describe,
    doctor,
    eval,
    export,
    inspect,
    lmms_tasks,
    methods,
    models,
    picto,
    point,
    published,
    recommend,
    report,
    score,
    serve,
    vlmevalkit,
)
from .common import LAYOUT, Parser

COMMANDS = (
    describe,
    recommend,
    eval,
    calibrate,
    score,
    compare,
    export,
    published,
    report,
    methods,
    models,
    doctor,
    inspect,
    bench,
    serve,
    lmms_tasks,
    vlmevalkit,
    point,
    demo,
    picto,
)
EXAMPLES = """examples:
  vlm-fix describe --method vcd,pai                        a caption with and without methods, bundled model and image
  vlm-fix eval all --method vcd,pai --limit 20             the same measured, in about two minutes on a CPU
  vlm-fix recommend --budget 30m                           which method for this model and data, proven on other images
  vlm-fix eval chair --model llava-hf/llava-1.5-7b-hf --data coco:/data/coco --method pai,vcd
  vlm-fix score chair captions.jsonl --variant pattern
  vlm-fix compare greedy.jsonl method.jsonl --benchmark chair
  vlm-fix methods
  vlm-fix doctor                                           does every kind of method act on this installation?"""


def _parser() -> argparse.ArgumentParser:
    from vlm_fix import __version__

    parser = Parser(
        "vlm-fix",
        description="Make pretrained vision-language models hallucinate less, without training, and measure it.",
        epilog=EXAMPLES,
        formatter_class=LAYOUT,
    )
    parser.add_argument("--version", action="version", version=f"vlm-fix {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0; 1 if doctor found a fault; 2 after a user's error; 130 when interrupted.

    A user's error is one sentence on stderr.
    """
    typed = list(sys.argv[1:] if argv is None else argv)
    if not typed:
        _parser().print_help()
        return 0
    args, rest = _parser().parse_known_args(typed)
    if rest and "rest" not in args:
        extra = f"{args.parser.prog} takes no further argument, so {' '.join(rest)} has no meaning"
        args.parser.error(args.parser.no_option(rest[0]) if rest[0].startswith("-") else extra)
    args.rest = rest
    args.argv = typed
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return args.run(args) or 0
    except VlmFixError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None:  # transformers hides why a module of its own cannot be imported
            print(f"error: {error} ({error.__cause__})", file=sys.stderr)
        else:
            print(f"error: {error.name} is not installed: pip install 'vlm-fix[eval]'", file=sys.stderr)
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
        hint = "; what is done can be continued with --resume" if "resume" in args else ""
        print(f"error: {place}: {error.strerror}: give a place that can be written{hint}.", file=sys.stderr)
        return 2
    return 0


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Print the package's own warnings as a sentence, and those of libraries with their origin."""
    ours = [module for name, module in sys.modules.items() if name.split(".")[0] == "vlm_fix"]
    if category is UserWarning and filename in [getattr(module, "__file__", None) for module in ours]:
        print(f"warning: {message}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))
