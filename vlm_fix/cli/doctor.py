"""vlm-fix doctor: check on this installation that one method of each kind acts, rests when neutral, and comes off clean."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vlm_fix.errors import VlmFixError

from .common import add, add_json, add_model, add_weights, console, table

ABOUT = """Each kind of method is tried with one method on a bundled scene:
  changed    the answer or its logits differ from the plain model's
  neutral    at its neutral setting every token and logit is the plain model's, bit for bit
  unwrapped  after unwrap every logit is the plain model's, bit for bit
The exit code is 1 if a check fails. A method that another model than picto-llava refuses is listed, not failed.

examples:
  vlm-fix doctor
  vlm-fix doctor --model llava-hf/llava-1.5-7b-hf --json"""
PACKAGES = ("transformers", "torch", "accelerate", "tokenizers", "huggingface_hub", "safetensors", "numpy", "pillow")
QUESTION = "Describe the image."
TOKENS = 8


@dataclass(frozen=True)
class Probe:
    """One method for a kind: a setting that picto-llava feels, and the one that must change nothing."""

    kind: str
    spec: str  # {rates}: a falling rate for each layer, as calibration would find it
    neutral: str
    logits: bool = True  # False: its own decoding loop returns tokens alone


PROBES = (
    Probe("attention", "pai:alpha=1", "pai:alpha=0"),
    Probe("heads", "vhr:alpha=4", "vhr:alpha=1"),
    Probe(
        "hidden states", "iri:lambda_a=1,lambda_m=1,rr_attention={rates},rr_mlp={rates}", "iri:lambda_a=0,lambda_m=0"
    ),
    Probe("contrast", "vcd:alpha=2", "vcd:alpha=0"),
    Probe("logits", "dola:alpha=2", "dola:alpha=0"),
    Probe("pruning before the LM", "hiprune:keep=0.25", "hiprune:keep=1.0"),
    Probe("pruning in layers", "fastv:keep=0.25", "fastv:keep=1.0"),
    Probe("pruning of the cache", "knorm:keep=0.25", "knorm:keep=1.0"),
    Probe("procedure: other inputs", "carve", "carve:top=1"),
    Probe("procedure: decoding loop", "sgrs", "sgrs:top_k=1", logits=False),
)


@dataclass
class Finding:
    """What was seen of one method. `refused` holds the sentence with which the model was refused, `error` a crash."""

    kind: str
    method: str
    changed: bool | None = None  # None: not reached
    neutral: bool | None = None
    unwrapped: bool | None = None
    refused: str = ""
    error: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return bool(self.refused or (self.changed and self.neutral and self.unwrapped and not self.error))


def add_to(commands: Any) -> None:
    parser = add(commands, "doctor", "check that every kind of method acts on this installation", run, ABOUT)
    add_model(parser)
    add_weights(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the installation, then one line for each kind of method. Returns 0, or 1 if a check failed."""
    from rich.console import Console

    about, stderr = installation(), Console(stderr=True, highlight=False)
    if not args.json:
        _tell(about)
    with stderr.status("loading the model") if stderr.is_terminal else contextlib.nullcontext():
        model, inputs = _load(args)
    device, dtype = str(model.device), str(model.dtype).removeprefix("torch.")
    if not args.json:
        print(f"model           {args.model} ({dtype} on {device})\n", flush=True)
    findings, bundled = [], args.model.startswith("picto-")
    with warnings.catch_warnings(), _one_thread() if bundled else contextlib.nullcontext():
        warnings.filterwarnings("ignore", ".* (changed nothing in this call|settings are neutral)")  # the table tells
        warnings.filterwarnings("ignore", ".* is not a version that vlm-fix was tested on")  # so do the versions
        for number, finding in enumerate(examine(model, inputs, must_run=bundled), 1):
            findings.append(finding)
            print(f"{number}/{len(PROBES)} {finding.kind} ({finding.seconds:.1f} s)", file=sys.stderr, flush=True)
    failed = sum(not f.ok for f in findings)
    if args.json:
        where = {"model": args.model, "device": device, "dtype": dtype}
        print(json.dumps({**about, **where, "ok": not failed, "checks": [_row(f) for f in findings]}, indent=2))
    else:
        _show(findings)
        print(_verdict(findings, about))
    return int(failed > 0)


def installation() -> dict[str, Any]:
    """Versions, devices, and whether vlm-fix was tested with this transformers."""
    import torch

    from vlm_fix import __version__
    from vlm_fix.families.compat import NEWEST, OLDEST, is_tested

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "versions": {
            "vlm-fix": __version__,
            "python": platform.python_version(),
            **{package: installed(package) for package in PACKAGES},
        },
        "tested": {"transformers": f"{OLDEST} to {NEWEST}", "this_one": is_tested()},
        "devices": [f"cpu ({torch.get_num_threads()} threads)", *map(torch.cuda.get_device_name, cuda)],
    }


def examine(model: Any, inputs: dict[str, Any], must_run: bool = True, tokens: int | None = None) -> Iterator[Finding]:
    """Try every probe on an unwrapped model. `must_run`: count a refusal as a failure."""
    tokens = tokens or TOKENS
    plain = _answer(model, inputs, tokens)
    for probe in PROBES:
        start = time.perf_counter()
        finding = Finding(probe.kind, probe.spec.partition(":")[0])
        try:
            finding.refused = _refusal(model, probe)
            if finding.refused and must_run:
                finding.refused, finding.error = "", finding.refused
            elif not finding.refused:
                _try(model, inputs, tokens, probe, plain, finding)
        except Exception as error:  # a crash of one method must not hide what the others do
            finding.error = str(error) if isinstance(error, VlmFixError) else f"{type(error).__name__}: {error}"
        finding.seconds = time.perf_counter() - start
        yield finding


def _spec(model: Any, probe: Probe) -> str:
    depth = model.config.get_text_config().num_hidden_layers
    return probe.spec.format(rates="|".join(f"{1 - i / depth:.3f}" for i in range(depth)))


def _refusal(model: Any, probe: Probe) -> str:
    """The sentence with which `wrap` refuses the method on this model; empty if it does not."""
    import vlm_fix

    try:
        with vlm_fix.wrapped(model, _spec(model, probe)):
            return ""
    except VlmFixError as error:
        return str(error)


def _try(model: Any, inputs: dict[str, Any], tokens: int, probe: Probe, plain: list[Any], finding: Finding) -> None:
    import vlm_fix

    with vlm_fix.wrapped(model, _spec(model, probe)):
        answer = _answer(model, inputs, tokens, probe.logits)
        finding.changed = not _same(answer, plain[: len(answer)])
    with vlm_fix.wrapped(model, probe.neutral):
        finding.neutral = _same(_answer(model, inputs, tokens), plain)
    finding.unwrapped = _same(_answer(model, inputs, tokens), plain)


def _answer(model: Any, inputs: dict[str, Any], tokens: int, logits: bool = True) -> list[Any]:
    """A greedy answer: its tokens, then the logits of every step before and after processors."""
    how: dict[str, Any] = {"output_logits": True, "output_scores": True} if logits else {}
    out = model.generate(**inputs, **how, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True)
    return [out.sequences, *(out.logits or ()), *(out.scores or ())] if logits else [out.sequences]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run a model as small as picto-llava on one thread: on a busy machine more threads wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _same(one: list[Any], other: list[Any]) -> bool:
    import torch

    return len(one) == len(other) and all(map(torch.equal, one, other))


def _load(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    try:
        from vlm_fix.eval.picto import scene
        from vlm_fix.eval.prompts import encode
        from vlm_fix.eval.run.loading import load_model
    except ModuleNotFoundError as error:
        raise VlmFixError(
            f"doctor runs on the bundled model and scenes, which need {error.name}: pip install 'vlm-fix[eval]'."
        ) from None
    model, processor, _ = load_model(args.model, args.dtype, args.device)
    return model, dict(encode(model, processor, [scene("test", 0, 0).image], [QUESTION]))


def _tell(about: dict[str, Any]) -> None:
    known = "a tested version" if about["tested"]["this_one"] else "NOT a tested version"
    for name, number in about["versions"].items():
        note = f" ({known}; tested: {about['tested']['transformers']})" * (name == "transformers")
        print(f"{name:<15} {number or 'not installed'}{note}")
    print(f"devices         {', '.join(about['devices'])}", flush=True)


def _show(findings: list[Finding]) -> None:
    rows = table("kind", "method", "changed", "neutral", "unwrapped exact", gap=0)
    for f in findings:
        marks = [
            {None: "-", True: "ok", False: "[bold red]FAILED[/]"}[seen] for seen in (f.changed, f.neutral, f.unwrapped)
        ]
        rows.add_row(f.kind, f.method, *marks)
    console().print(rows)
    for f in findings:
        if f.refused or f.error:
            print(f"{f.method}: {'refused: ' * bool(f.refused)}{f.refused or f.error}")


def _row(finding: Finding) -> dict[str, Any]:
    return {**asdict(finding), "seconds": round(finding.seconds, 2), "ok": finding.ok}


def _verdict(findings: list[Finding], about: dict[str, Any]) -> str:
    failed = [f.kind for f in findings if not f.ok]
    if not failed:
        refused = sum(bool(f.refused) for f in findings)
        return (
            "All kinds of method work here." if not refused else f"All that this model takes work; {refused} refused."
        )
    remedy = (
        "please report this with the output of `vlm-fix doctor --json`"
        if about["tested"]["this_one"]
        else f"install transformers {about['tested']['transformers']}, or report this with `vlm-fix doctor --json`"
    )
    return f"{len(failed)} of {len(findings)} kinds failed ({', '.join(failed)}): {remedy}."
