"""vlm-fix serve: vLLM's server with methods inside."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import importlib.util
import json
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError

from .common import add

EXAMPLES = """examples:
  vlm-fix serve picto-llava --method pai:alpha=0.3
  vlm-fix serve llava-hf/llava-1.5-7b-hf --method @vlm-fix.yaml        what vlm-fix recommend found
  vlm-fix serve llava-hf/llava-1.5-7b-hf --method hiprune:keep=192+pai --tensor-parallel-size 1 --port 8000

This is `vllm serve MODEL --additional-config '{"vlm_fix": ...}'`; whatever else is given goes to vLLM."""
METADATA, ADDITIONAL, MEMORY = "vllm", "--additional-config", "--gpu-memory-utilization"
BUNDLED = ("picto-llava", "picto-smol")


def add_to(commands: Any) -> None:
    parser = add(commands, "serve", "serve a model by vLLM, with methods inside", run, EXAMPLES)
    parser.add_argument(
        "model", metavar="MODEL", help="folder, Hugging Face name or picto-llava; options of vllm serve follow"
    )
    parser.add_argument(
        "--method", default="", metavar="A+B", help="one method, a stack or @vlm-fix.yaml; none: plain vLLM"
    )
    parser.add_argument("--calibration", action="append", metavar="FILE", help="of vlm-fix calibrate; may be repeated")
    parser.set_defaults(rest=[])


def run(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise VlmFixError("vLLM is not installed: pip install 'vlm-fix[vllm]'.")
    from vlm_fix.eval.picto import model_path
    from vlm_fix.registry import file_of
    from vlm_fix.serving.memory import share
    from vlm_fix.serving.plugin import planned
    from vlm_fix.serving.refusals import check_options
    from vlm_fix.serving.settings import Settings

    rest, bundled = list(args.rest), args.model.startswith("picto-") and not Path(args.model).exists()
    path = str(model_path(args.model)) if bundled else args.model
    additional = _taken(rest)
    if args.method:
        files = [str(Path(f).resolve()) for f in args.calibration or ()]
        file = file_of(args.method)
        method = [f"@{Path(file).expanduser().resolve()}"] if file else args.method
        additional["vlm_fix"] = {"method": method, "calibration": files} if files else method
    elif args.calibration:
        raise VlmFixError("--calibration fills the settings of a method: give --method, too.")
    settings = Settings.read(additional)
    if settings is not None:  # one sentence before vLLM starts
        try:
            engine = planned(settings, path, _value(rest, "--revision"), "--trust-remote-code" in rest)
        except VlmFixError as error:
            if isinstance(error.__cause__, OSError):  # there is nothing of this name
                raise VlmFixError(_unknown(args.model, error.__cause__)) from error
            raise
        check_options(rest, engine)
    if "--uds" not in rest:
        _check_port(_value(rest, "--host") or "", _value(rest, "--port") or "8000")
    if told := _unbegun(path, _value(rest, "--revision"), "--trust-remote-code" in rest):
        print(told, file=sys.stderr)
    if bundled and "--served-model-name" not in rest:
        rest += ["--served-model-name", args.model]
    if not _value([word.replace("_", "-") for word in rest], MEMORY) and (fits := share()):
        print(f"note: vLLM may take {fits:.0%} of this machine's memory, as more is not free; {MEMORY} sets another share.",
              file=sys.stderr)  # fmt: skip
        rest += [MEMORY, str(fits)]
    if additional:
        rest += [ADDITIONAL, json.dumps(additional)]
    _serve(path, rest)


def _check_port(host: str, port: str) -> None:
    """Raise VlmFixError where another program listens; vLLM would load the model first."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except (OSError, OverflowError, ValueError) as error:
            raise VlmFixError(
                f"port {port} of {host or 'this machine'} cannot be used ({error}): choose another --port."
            ) from None


def _unknown(name: str, error: OSError) -> str:
    """What to say of a model that cannot be found: names near it, of those on this machine, and what a model may be."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = (
        folder.name.removeprefix("models--").replace("--", "/") for folder in Path(HF_HUB_CACHE).glob("models--*")
    )
    near = difflib.get_close_matches(name, [*BUNDLED, *cached], n=1)
    cause = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return (
        f"model {name!r} could not be loaded ({cause}): "
        + (f"did you mean {near[0]!r}? Else " if near else "")
        + "give a folder "
        f"with a checkpoint, a Hugging Face name that this machine can download, or {' or '.join(BUNDLED)}."
    )


def _serve(path: str, rest: list[str]) -> None:
    """`vllm serve`; vLLM's wheel for CPUs has another package name, for which its command line does not start."""
    try:
        importlib.metadata.version(METADATA)
    except importlib.metadata.PackageNotFoundError:
        sys.argv = ["vllm", "--model", path, *rest]
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
        return
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", "serve", path, *rest]
    main()


def _unbegun(path: str, revision: str | None, trusted: bool) -> str:
    """What to tell where the tokenizer begins a prompt with a token that the chat template does not write: vLLM adds none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trusted)
    except Exception:
        return ""  # vLLM will say why it cannot be read
    first, template = tokenizer.bos_token, str(tokenizer.chat_template or "")
    begins = first and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if not begins or not template or first in template or "bos_token" in template:
        return ""
    return (
        f"note: the chat template of this model writes no {first}, and vLLM adds none to a chat, but generate's prompt has it: "
        'send "add_special_tokens": true with each request, as vlm-fix eval --server does.'
    )


def _value(rest: list[str], option: str) -> str | None:
    for i, word in enumerate(rest):
        if word == option and i + 1 < len(rest):
            return rest[i + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _taken(rest: list[str]) -> dict[str, Any]:
    """Take --additional-config out of `rest`."""
    text = _value(rest, ADDITIONAL)
    if text is None:
        return {}
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not isinstance(given, dict) or "vlm_fix" in given:
        raise VlmFixError(f"{ADDITIONAL} {text!r} must be a JSON object without vlm_fix, for which there is --method.")
    at = next(i for i, word in enumerate(rest) if word.partition("=")[0] == ADDITIONAL)
    del rest[at : at + (1 if "=" in rest[at] else 2)]
    return given
