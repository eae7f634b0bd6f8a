"""Run VLMEvalKit with a method: load its run.py, register wrapped models under new names, call its main.

    vlm-fix vlmevalkit VLMEvalKit --method pai:alpha=0.2 --model llava_next_vicuna_7b --data POPE
    torchrun --nproc-per-node=8 -m vlm_fix.cli vlmevalkit VLMEvalKit --method vcd --model Qwen2.5-VL-7B-Instruct --data MME

Read at open-compass/VLMEvalKit@e8e78f0: run.py builds `supported_VLM[name](**kwargs)`, the model's class keeps the
Hugging Face model in `.model`, and the name is part of every result file; the new name (llava_next_vicuna_7b--pai-alpha-0.2)
keeps answers with and without the method apart. Its own LLaVA-1.5 class is not a Hugging Face model and is refused.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError

from . import inside

OTHER_MODELS = ("--config", "--use-vllm", "--api-mode", "--base-url")


def rename(arguments: Sequence[str], method: str) -> tuple[list[str], dict[str, str]]:
    """Return run.py's arguments with the models renamed, and {new name: name}."""
    for refused in OTHER_MODELS:  # argparse also accepts prefixes of flags
        if not any(a.startswith("--") and len(a) > 2 and refused.startswith(a.partition("=")[0]) for a in arguments):
            continue
        raise VlmFixError(f"{refused} gives run.py other models than Hugging Face ones: name them with --model.")
    slug = re.sub(r"[^\w.+-]+", "-", method).strip("-")
    new: list[str] = []
    names: dict[str, str] = {}
    flag = ""
    for token in (t for a in arguments for t in (a.split("=", 1) if a.startswith("--model=") else [a])):
        if token.startswith("-"):
            flag = token
        elif flag == "--model":
            names[f"{token}--{slug}"] = token
            token = f"{token}--{slug}"
        new.append(token)
    if not names:
        raise VlmFixError("run.py gets no model: add --model NAME, one of those in its vlmeval/config.py.")
    return new, names


def build(original: Callable[..., Any], method: str, calibration: str, **kwargs: Any) -> Any:
    """Build a model of VLMEvalKit and wrap its Hugging Face model; any failure ends the process."""
    with inside.exit_on_failure():
        made = original(**kwargs)
        if not hasattr(getattr(made, "model", None), "config"):
            raise VlmFixError(
                f"{type(made).__name__} of VLMEvalKit holds no Hugging Face model: choose another --model."
            )
        inside.apply(made.model, method, calibration)
    return made


def launch(folder: str | Path, method: str, arguments: Sequence[str], calibration: str = "") -> None:
    """Run VLMEvalKit, a clone in `folder`, with `arguments` for its run.py and the method (see `inside.specs`)."""
    inside.specs(method)
    renamed, names = rename(arguments, method)
    script = Path(folder).expanduser().resolve() / "run.py"
    if not script.is_file():
        raise VlmFixError(f"{script} does not exist: clone github.com/open-compass/VLMEvalKit and give its folder.")
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *renamed]
    spec = importlib.util.spec_from_file_location("vlmevalkit_run", script)
    assert spec and spec.loader
    run = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(run)  # it assigns GPUs to processes, which must happen before torch uses one
    except ModuleNotFoundError as error:
        raise VlmFixError(f"VLMEvalKit needs {error.name}: pip install -e {script.parent}.") from None
    for name, original in names.items():
        if original not in run.supported_VLM:
            raise VlmFixError(f"VLMEvalKit knows no model {original!r}: choose one of its vlmeval/config.py.")
        run.supported_VLM[name] = functools.partial(build, run.supported_VLM[original], method, calibration)
    run.load_env()
    run.main()
