"""Parsers, options, output paths and terminal tables that several commands share."""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers.choices import Labels, Scorer, Variant

LAYOUT = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)
SCORERS, VARIANTS, LABELS = get_args(Scorer), get_args(Variant), get_args(Labels)
FIGURES = (".svg", ".png", ".pdf")
DTYPES = ("auto", "float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage, and names what was probably meant."""

    typed: Sequence[str] = ()
    source = ""  # the file that the options come from

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # argparse calls it for commands, too
        self.typed = [*args] if args is not None else []
        if not self.source:  # a file's options come first, and what was typed replaces them
            self._once()
        return super().parse_known_args(args, namespace)

    def _once(self) -> None:
        """An error where an option that keeps its last value is typed twice, or a method is empty, as an unset variable is."""
        typed = [*itertools.takewhile(lambda word: word != "--", self.typed)]
        seen = set[str]()
        for word, after in itertools.zip_longest(typed, typed[1:], fillvalue=""):
            name, equals, value = word.partition("=")
            action = self._option_string_actions.get(name)
            if type(action) is not argparse._StoreAction:
                continue
            if action.dest in seen:
                several = ": A,B tries them one by one, A+B together" if action.dest == "method" else ""
                self.error(f"{name} is given twice; give it once{several}")
            if action.dest == "method" and not (value if equals else after).strip():
                self.error(f"{name} is empty: name a method, or leave it out")
            seen.add(action.dest)

    def error(self, message: str) -> NoReturn:
        message = f"{self.source}: {message}" if self.source else message
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            words = re.findall(r"[^\s',]+", found[2])
            near = difflib.get_close_matches(found[1], words, n=1)
            what = (
                "there is no command"
                if "COMMAND" in message
                else f"{message.rpartition(': invalid choice')[0]}: there is no"
            )
            known = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(words)}."
            self.exit(2, f"error: {what} {found[1]!r}; {known}\n")
        if found := re.search(r"argument (\S+): invalid (int|float) value: ('.*')", message):
            kind = "a whole number" if found[2] == "int" else "a number"
            message = f"{message[: found.start()]}{found[1]} is {found[3]}: give {kind}"
        own = (
            self.typed
            if self._subparsers is None
            else itertools.takewhile(lambda word: word.startswith("-"), self.typed)
        )
        if self.get_default("rest") is None and (wrong := self.unknown([*own])):
            message = self.no_option(wrong)
        self.exit(2, f"error: {message}" + ("\n" if message.endswith("?") else f"; see `{self.prog} --help`.\n"))

    def unknown(self, words: Sequence[str]) -> str:
        """The first of the words typed that is an option which this parser does not have."""
        names = (word.partition("=")[0] for word in itertools.takewhile(lambda word: word != "--", words))
        options = (name for name in names if re.match(r"--[a-zA-Z]", name))
        return next((name for name in options if not any(own.startswith(name) for own in self.known())), "")

    def known(self) -> list[str]:
        return [option for option in self._option_string_actions if option.startswith("--")]

    def no_option(self, name: str) -> str:
        near = difflib.get_close_matches(name.partition("=")[0], self.known(), n=1, cutoff=0.5)
        return f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else "")


def add(
    group: Any,
    name: str,
    help: str,
    run: Callable[[argparse.Namespace], int | None] | None = None,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """Add the parser of command `name` to `group`; `run` gets the parsed arguments and may return an exit status."""
    made = group.add_parser(
        name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=epilog, formatter_class=LAYOUT
    )
    if run:
        made.set_defaults(run=run, parser=made)
    return made


def add_model(parser: Any) -> None:
    parser.add_argument(
        "--model", default="picto-llava", metavar="NAME", help="folder or Hugging Face name (%(default)s)"
    )


def add_weights(parser: Any, device: str | None = "auto") -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights")
    parser.add_argument("--device", default=device, metavar="DEV", help="auto, cpu, cuda or cuda:N (auto)")


def add_images(parser: Any) -> None:
    parser.add_argument("--ids", metavar="FILE", help="image ids to use, one a line (coco)")
    parser.add_argument("--limit", type=int, metavar="N", help="number of images (500)")


def add_new_tokens(parser: Any, default: int, help: str) -> None:
    parser.add_argument("--new-tokens", type=int, default=default, metavar="N", help=f"{help} (%(default)s)")


def check_count(option: str, value: int) -> None:
    """Raise VlmFixError for a number below 1."""
    if value < 1:
        raise VlmFixError(f"{option} is {value}: give a whole number of at least 1.")


def add_json(parser: Any, help: str = "print JSON") -> None:
    parser.add_argument("--json", action="store_true", help=help)


def check_place(place: str, folder: bool = False) -> None:
    """Raise VlmFixError if a file or folder cannot be written, before the work is done rather than after."""
    path = Path(place)
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    within = existing if existing.is_dir() else existing.parent
    if (existing != path and not existing.is_dir()) or not os.access(within, os.W_OK):
        raise VlmFixError(f"{place} cannot be written: give a place in a folder that you may write to.")
    if not folder and path.is_dir():
        raise VlmFixError(f"{place} is a folder: give a file in it.")


def check_figure(option: str, place: str) -> None:
    """Raise VlmFixError for a figure that cannot be written, or whose ending names no format of one."""
    if Path(place).suffix not in FIGURES:
        raise VlmFixError(f"--{option} {place!r} must end in {', '.join(FIGURES[:-1])} or {FIGURES[-1]}.")
    check_place(place)


def finite(text: str) -> float:
    """A finite number, as the type of an option."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number: give one")
    return value


def written(value: Any) -> str:
    """Format a setting's value as in a spec."""
    if value is None:
        return "auto"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "|".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def table(*columns: str, gap: int = 1) -> Any:
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE_HEAD, show_lines=False, padding=(0, 2, gap, 0))


def console() -> Any:
    """Return a console as wide as the terminal, but at most 100 columns."""
    from rich.console import Console

    made = Console(highlight=False)
    made.width = min(made.width, 100) if made.is_terminal else 100
    return made
