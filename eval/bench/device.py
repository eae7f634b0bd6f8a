"""What has to be seen on an accelerator, in a few minutes: `results/gpu.sh` runs this.

Three parts, each written to the file as soon as it is there: the kernel of one decode row against its formula, and timed; per
shape, a reduced matrix of one method of each kind (scores of the fused row against the row kernel's, neutral settings and unwrap
bit for bit); per shape, `bench attention|decode|prune` of one method of each kind. It stops before a step that would not end in
time, and the file's `left` names what was not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import vlm_fix
from vlm_fix import launches
from vlm_fix.attention import fused
from vlm_fix.attention.forms import Condition, ScoreForm, TransferForm
from vlm_fix.attention.inputs import QueryRows
from vlm_fix.attention.scores import Scores
from vlm_fix.eval.files import write_atomic
from vlm_fix.hidden.push import Gate, formula, pushed

from .measuring import measure
from .models import SHAPES, build
from .specs import spec_of

RATES = "iri:rr_attention=RATES,rr_mlp=RATES"
MATRIX = {  # spec -> a neutral setting of it
    "pai:alpha=0.5": "pai:alpha=0",
    "zerotuning:rate=0.1": "zerotuning:rate=1",
    "act": "",
    "var:detector=secondary": "var:p=0",
    "gift": "gift:alpha=0",
    "hgai": "hgai:alpha=0",
    "spin:keep=0.7": "spin:keep=1",
    "tame": "tame:gamma=0",
    "visual_topk": "visual_topk:k=1.0",
    "random_direction": "random_direction:strength=0",
    "vhr": "vhr:alpha=1",
    RATES: "",
    "vcd:alpha=1": "vcd:alpha=0",
    "hiprune:keep=0.25": "hiprune:keep=1.0",
    "fastv:keep=0.25": "fastv:keep=1.0",
    "knorm:keep=0.5": "knorm:keep=1.0",
    "dola": "dola:alpha=0",
}
BENCHES = {
    "attention": ("pai", "vaf", "zerotuning", "act", "vhr", RATES, "pai @ eager"),
    "decode": ("vcd", "dola", "hf-cfg"),
    "prune": ("hiprune:keep=0.11", "fastv:keep=0.11", "knorm:keep=0.11"),
}
Step = tuple[str, Callable[[], Any]]


class Report:
    """What was found so far, and what is left; in the file before and after every step."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype, seconds: float):
        self.path, self.end = path, time.monotonic() + seconds
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        versions = {
            "vlm-fix": vlm_fix.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        self.found: dict[str, Any] = {
            "hardware": name,
            "dtype": str(dtype).removeprefix("torch."),
            "versions": versions,
        }
        self.found |= {"steps": {}, "seconds": {}, "left": []}

    def plan(self, steps: list[Step]) -> None:
        """These steps are to come."""
        self.found["left"] += [name for name, _ in steps]

    def run(self, steps: list[Step], share: float = 1.0) -> None:
        """The steps in turn, in this share of the time there is, as long as one more like the longest would end in it."""
        now, longest = time.monotonic(), 0.0
        for name, step in steps:
            end = now + share * (self.end - now)
            if time.monotonic() + longest > end:
                break
            self.write()
            start = time.monotonic()
            try:
                self.found["steps"][name] = step()
            except Exception as error:  # the other steps are still worth their minutes
                trace = traceback.format_exc(limit=-5)
                self.found["steps"][name] = {"error": f"{type(error).__name__}: {error}", "trace": trace}
            took = time.monotonic() - start
            self.found["seconds"][name] = round(took, 2)
            self.found["left"].remove(name)
            longest = max(longest, took * (not name.endswith(" build")))
            print(f"{name}: {took:.1f} s", flush=True)
        self.write()

    def write(self) -> None:
        write_atomic(self.path, json.dumps(self.found, indent=1) + "\n")


def kernel(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> list[dict[str, Any]]:
    """The decode row's kernel: its error against float64, and microseconds beside SDPA's and the row kernel's."""
    from vlm_fix.attention.kernel import edited_rows

    rows = []
    for heads, kv_heads, dim in ((32, 32, 128), (28, 4, 128)):
        for width in widths:
            g = torch.Generator().manual_seed(width)
            query, key, value = (
                torch.randn(1, h, n, dim, generator=g).to(device, dtype)
                for h, n in ((heads, 1), (kv_heads, width), (kv_heads, width))
            )
            slope = (1 + torch.rand(1, 1, 1, width, generator=g)).to(device)
            form = ScoreForm(slope, 2 - slope, slope.log())
            inputs = QueryRows(query, key, value, None, Scores(dim**-0.5))
            groups = (torch.arange(width) % 4).view(1, 1, 1, -1).to(device, torch.uint8)  # none is empty
            transfer = TransferForm(groups, 0.2, 0.8, (Condition(1, 0, 0, 1e-38), Condition(0, 1, 1, 0.1)))
            z, moved = fused.raw_scores(inputs), torch.zeros((), dtype=torch.bool, device=device)
            wide = [x.double() for x in (query, key, value)]
            moves, errors, times = (groups, transfer.numbers), {}, {}
            for name, given, how in (
                ("slopes", (form,), (None, [], None, None)),
                ("transfer", (form, transfer, moved), (*moves, None, None)),
                ("known_scores", (form, None, None, z), (None, [], None, z.double())),
            ):
                run = functools.partial(fused.decode_row, inputs, *given)
                exact = fused.formula(*wide, None, *form, *how, *inputs.scores)  # type: ignore[arg-type, call-arg]
                errors[name], times[name] = float((run().double() - exact).abs().max()), _microseconds(run, device)
            many: dict[str, Any] = {"enable_gqa": heads != kv_heads}
            rows.append(
                {
                    "heads": heads,
                    "kv_heads": kv_heads,
                    "width": width,
                    "error": max(errors.values()),
                    "errors": errors,
                    "transfer_was_told": bool(moved),
                    "fused_us": times["slopes"],
                    "fused_each_us": times
                    | {"scores": _microseconds(functools.partial(fused.raw_scores, inputs), device)},
                    "sdpa_us": _microseconds(
                        functools.partial(torch.nn.functional.scaled_dot_product_attention, query, key, value, **many),
                        device,
                    ),
                    "row_kernel_us": _microseconds(functools.partial(edited_rows, inputs), device),
                }
            )
    return rows


def pushes(device: torch.device) -> list[dict[str, Any]]:
    """The same of hidden states pushed along a direction, by width."""
    found = []
    for channels in (3584, 4096):
        g = torch.Generator().manual_seed(channels)
        x, d = (torch.randn(1, 1, channels, generator=g).to(device) for _ in range(2))
        for gate in (Gate(), Gate("away"), Gate("beta", 5.0, 1.0, 0.05)):
            run = functools.partial(pushed, x, d, 0.3, gate=gate)
            exact = formula(x.double(), d.double(), x.double(), x.double(), 0.3, True, True, *gate)
            with torch.no_grad():
                error, time_of = float((run().double() - exact).abs().max()), _microseconds(run, device)
            found.append({"channels": channels, "gate": gate.kind, "error": error, "us": time_of})
    return found


def _microseconds(run: Callable[[], Any], device: torch.device, times: int = 50) -> float:
    """The median of five rounds of `times` calls, after one that compiles."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found = []
    for _ in range(6):
        wait()
        start = time.perf_counter()
        for _ in range(times):
            run()
        wait()
        found.append(1e6 * (time.perf_counter() - start) / times)
    return round(statistics.median(found[1:]), 1)


def answer(model: Any, inputs: dict[str, Any], tokens: int) -> tuple[torch.Tensor, ...]:
    """-> tokens [1, n], logits and scores [1, n, V] of a greedy answer."""
    asked = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **asked)
    return out.sequences[:, -tokens:], torch.stack(out.logits, dim=1), torch.stack(out.scores, dim=1)


def check(model: Any, inputs: dict[str, Any], spec: str, neutral: str, tokens: int, plain: Any) -> dict[str, Any]:
    """One cell of the matrix: does it act, is what is neutral exact, and does the fused row agree with the row kernel?"""
    made: dict[str, Any] = {"spec": spec}
    with vlm_fix.wrapped(model, spec):
        own = answer(model, inputs, tokens)
        before = launches.use(False)
        try:
            unfused = answer(model, inputs, tokens)
        finally:
            launches.use(before)
    made["finite"] = bool(own[1].amax(dim=-1).isfinite().all())
    made["acts"] = bool((own[2] != plain[2]).any())
    same = int((own[0] == unfused[0]).long().cumprod(dim=1).sum())  # later steps had other tokens before them
    made["steps_alike"] = same
    made["fused_against_row_kernel"] = float((own[1] - unfused[1])[:, : max(1, same)].float().abs().max())
    made["unwrap_exact"] = all(map(torch.equal, answer(model, inputs, tokens), plain))
    if neutral:
        with vlm_fix.wrapped(model, neutral):
            made["neutral_exact"] = all(map(torch.equal, answer(model, inputs, tokens), plain))
    return made


def steps_of(shape: str, device: torch.device, dtype: torch.dtype, tokens: int, rounds: int) -> Iterator[Step]:
    """The steps on one shape, the model built in the first."""
    held: dict[str, Any] = {}

    def built() -> dict[str, Any]:
        held["model"], held["inputs"] = build(SHAPES[shape], device, dtype)
        held["plain"] = answer(held["model"], held["inputs"], 8)
        parameters = sum(p.numel() for p in held["model"].parameters())
        return {"parameters": parameters, "prompt_tokens": held["inputs"]["input_ids"].shape[1]}

    def full(spec: str) -> str:
        return spec_of(spec, held["model"].config.get_text_config().num_hidden_layers)

    def matrix(spec: str, neutral: str) -> Any:
        return check(held["model"], held["inputs"], full(spec), neutral, 8, held["plain"])

    def timed(spec: str) -> Any:
        name, at, how = spec.partition(" @ ")
        plain, row = measure(held["model"], held["inputs"], [full(name) + at + how], tokens, rounds)
        return {"plain": dataclasses.asdict(plain), "method": dataclasses.asdict(row)}

    yield f"{shape} build", built
    for spec, neutral in MATRIX.items():
        yield f"{shape} matrix {spec}", functools.partial(matrix, spec, neutral)
    for kind, specs in BENCHES.items():
        for spec in specs:
            yield f"{shape} bench {kind} {spec}", functools.partial(timed, spec)


def main() -> None:
    """Run the program; the module docstring says what it does."""
    parser = argparse.ArgumentParser(description="check and time vlm-fix on an accelerator, within a time limit")
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--shapes", default="llava-1.5-7b,qwen2.5-vl-7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--widths", default="700,4096,16384", help="columns of the kernel's test")
    parser.add_argument("--output", type=Path, default=Path("results/bench/gpu.json"))
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    report = Report(args.output, device, dtype, args.seconds)
    widths = tuple(int(width) for width in args.widths.split(","))
    shapes = args.shapes.split(",")
    first: list[Step] = [("kernel", lambda: kernel(device, dtype, widths)), ("pushes", lambda: pushes(device))]
    parts = [first, *(list(steps_of(shape, device, dtype, args.new_tokens, args.rounds)) for shape in shapes)]
    for steps in parts:
        report.plan(steps)
    for i in range(len(parts)):
        report.run(parts[i], 1 / max(1, len(parts) - i) if i else 1.0)  # no shape may take another's minutes
        parts[i] = []  # its model goes
        if device.type == "cuda":
            torch.cuda.empty_cache()
    left = report.found["left"]
    print(f"left: {', '.join(left)}" if left else "all steps ran", flush=True)


if __name__ == "__main__":
    main()
