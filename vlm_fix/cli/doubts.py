"""What is to doubt of answers that were scored, said beside the figures."""

from __future__ import annotations

import math
import sys
from typing import Any

from vlm_fix.eval.files import counted
from vlm_fix.eval.scorers.benchmark import Benchmark, Choice

MANY = 20
"""So many answers, and hardly one of them wrong, are doubted."""
NEARLY = 0.99


def tell(found: Any, benchmark: Benchmark, path: str = "") -> None:
    """Say on stderr what is to doubt of an answer file: misread answers, none with yes or no or a letter, and none that is wrong.

    `found` is what `Benchmark.shown` returns; `path` is named where there are several files.

    Of misread answers with an example, and the option that reads them. Where one of the parts has all answers, as the
    layouts name it, it alone is told of.
    """
    layouts = [layout.answers for layout in benchmark.layouts.values()]
    totals = [getattr(answers, "total", "") for answers in layouts]
    choices = any(isinstance(answers, Choice) for answers in layouts)
    right = {accuracy for answers in layouts if (accuracy := getattr(answers, "accuracy", ""))}
    parts = found if isinstance(found, dict) else {"": found.to_dict()}
    parts = {part: figures for part, figures in parts.items() if isinstance(figures, dict)}
    whole = {part: parts[part] for part in totals if part and part in parts}
    doubted: list[tuple[str, str]] = []
    for part, figures in (whole or parts).items():
        where = (f"{path}: " if path else "") + (f"{part}: " if part and not whole else "")
        n, misread = figures.get("n", 0), figures.get("misread", 0)
        if misread:
            which = f"{counted(misread, 'answer')} against {'its' if misread == 1 else 'their'} plain word"
            note(
                f"{where}the scorer {figures['scorer']} takes {which}: {figures['misread_example']}; --scorer ours reads "
                f"{'it' if misread == 1 else 'them'}"
            )
        if n and figures.get("unparsed") == n:
            held = "yes or no" if "yes_ratio" in figures or not choices else "the letter of a choice"
            note(f"{where}none of the {n} replies holds {held}; if they are in another key, name it with --answer-key")
        best = max((figures.get(name, 0) for name in right), default=0)
        if n >= MANY and best >= NEARLY:
            share = (
                f"each of the {n} answers is"
                if best == 1
                else f"{math.floor(1000 * best) / 10} % of the {n} answers are"
            )
            doubted.append((where, share))
    if doubted:
        where, share = doubted[0]
        more = f" (and so in {counted(len(doubted) - 1, 'other part')})" if len(doubted) > 1 else ""
        note(
            f"{where}{share} right{more}: if these are the labels and not the replies, name the key of the replies with "
            "--answer-key"
        )


def note(text: str) -> None:
    """Say a doubt on stderr."""
    print(f"note: {text}", file=sys.stderr)
