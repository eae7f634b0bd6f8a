"""Benchmark `draft` on a real model: tokens per verification and speed against the model's own decoding, same tokens checked.

`vlm-fix bench draft` answers Picto scenes greedily, one prompt at a time, in interleaved rounds: in each, the model alone runs
right before each spec, and the ratio of tokens/s is between these two; the table shows the median. Before the rounds each
answers once, which is not counted. Speed counts the whole answer, prompt included. Random weights accept nothing, so a
trained model is needed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

import vlm_fix
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.picto import scene
from vlm_fix.eval.prompts import encode
from vlm_fix.eval.run.loading import hardware, load_model

from .clock import enough

SPECS = ("draft:keep=0.1", "draft", "draft:keep=0.5", "draft:keep=1.0")


def run(
    specs: Sequence[str],
    model: str,
    new_tokens: int,
    rounds: int,
    device: str = "auto",
    dtype: str = "auto",
    tick: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Measure and return settings, hardware and rows. `tick(total)` is called after each answer.

    Raises VlmFixError for too few tokens or rounds, and for a spec that does not draft, before anything is timed.
    """
    enough(new_tokens, rounds)
    chosen = list(specs) or list(SPECS)
    net, processor, identity = load_model(model, dtype, device)
    found: dict[str, dict[str, list[float]]] = {spec: {} for spec in chosen}
    how = {"max_new_tokens": new_tokens, "do_sample": False}
    for number in (-1, *range(rounds)):  # the first warms up
        inputs = dict(encode(net, processor, [scene("test", 0, max(0, number)).image], ["Describe the image."]))
        for spec in chosen:
            plain, alone = answered(net, inputs, how)
            with vlm_fix.wrapped(net, spec):
                led, seconds = answered(net, inputs, how)
                report = vlm_fix.drafted(net)
            if report is None:
                raise VlmFixError(f"bench draft times draft and its settings, and {spec} does not draft.")
            if number < 0:
                continue
            own = found[spec]
            for name, value in {
                "ratio": alone / seconds * len(led) / len(plain),
                "tokens_per_round": report.tokens_per_round,
                "accepted": report.accepted / max(1, report.drafted),
                "columns": report.columns,
                "same": float(led == plain),
                "tokens": float(len(led)),
            }.items():
                own.setdefault(name, []).append(value)
            if tick:
                tick(rounds * len(chosen))
    rows: list[dict[str, Any]] = [
        {"spec": spec, **{name: statistics.median(values) for name, values in own.items()}}
        for spec, own in found.items()
    ]
    for row in rows:
        row["same"] = sum(found[row["spec"]]["same"])
    settings = {
        "model": identity,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "date": datetime.now(UTC).date().isoformat(),
    }
    return {"kind": "draft", "settings": settings, "hardware": hardware(net.device), "rows": rows}


def answered(model: Any, inputs: dict[str, Any], how: dict[str, Any]) -> tuple[list[int], float]:
    """The answer's tokens and the seconds they took."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    tokens = model.generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, time.perf_counter() - begin


def table(results: dict[str, Any]) -> Any:
    """The rows as a table for the terminal."""
    from rich import box
    from rich.table import Table

    made = Table(
        "spec", "columns kept", "tokens per verification", "accepted", "speed", "same answers", box=box.SIMPLE_HEAD
    )
    rounds = results["settings"]["rounds"]
    for row in results["rows"]:
        made.add_row(
            row["spec"],
            f"{row['columns']:.2f}",
            f"{row['tokens_per_round']:.2f}",
            f"{row['accepted']:.2f}",
            f"{row['ratio']:.2f}x",
            f"{row['same']:.0f} of {rounds}",
        )
    return made
