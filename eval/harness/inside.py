"""Apply a method inside another evaluation harness: shared by the lmms-eval plugin and the VLMEvalKit launcher.

Both harnesses catch exceptions (an answer becomes "", a failed run exits with status 0) and silence warnings. Failures
therefore raise SystemExit, which neither catches, and warnings are printed here.
"""

from __future__ import annotations

import functools
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import vlm_fix
from vlm_fix import registry
from vlm_fix.errors import VlmFixError


def specs(text: str) -> list[str]:
    """Parse one stack: "pai:alpha=0.2;gamma=1.1+vcd" -> ["pai:alpha=0.2,gamma=1.1", "vcd"].

    ";" stands for ",", which separates the arguments of --model_args. Raises VlmFixError for an unknown method or more
    than one run.
    """
    runs = registry.split_methods(text.replace(";", ","))
    if len(runs) != 1:
        raise VlmFixError(f"method={text!r} names {len(runs)} runs: give one here, and stack methods with +.")
    registry.parse(runs[0])  # before a model is loaded
    return runs[0]


@contextmanager
def exit_on_failure() -> Iterator[None]:
    """End the process with one sentence if anything fails inside, after a traceback unless it is the user's error."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, VlmFixError):
            traceback.print_exc()
        raise SystemExit(f"error: {str(error).strip() or type(error).__name__}") from error


def apply(model: Any, method: str, calibration: str = "") -> None:
    """Wrap a Hugging Face model with `method` (see `specs`); its `generate` prints warnings and exits on failure.

    calibration: files of `vlm-fix calibrate`, separated by ";".
    """
    vlm_fix.wrap(model, specs(method), [file for file in calibration.split(";") if file])
    inner, told = model.generate, set[str]()

    @functools.wraps(inner)
    def generate(*args: Any, **kwargs: Any) -> Any:
        with exit_on_failure(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            output = inner(*args, **kwargs)
        for message in {str(w.message) for w in caught if issubclass(w.category, UserWarning)} - told:
            told.add(message)
            print(f"warning: {message}", file=sys.stderr)
        return output

    model.generate = generate
