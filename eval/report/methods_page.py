"""Generate docs/methods.md from the method dataclasses, the published figures and the results in results/.

`python -m vlm_fix.eval.methods_page docs/methods.md` (or `make docs`) writes the page, and data/measured.json for
`vlm-fix methods NAME`. Costs are counted: one prompt with
one image runs through a small random-weight LLaVA, and hooks count the rows that its decoder layers and its vision tower
process, as multiples of the unwrapped model's.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import vlm_fix
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import bench
from vlm_fix.eval.files import write_atomic
from vlm_fix.method import Method

from . import measured, methods_table, models_page, published

TITLES = {
    "attention": "Attention",
    "heads": "Heads",
    "hidden": "Hidden states",
    "contrast": "Contrastive decoding",
    "logits": "Logits of one branch",
    "procedure": "Programs around generate",
    "pruning": "Token pruning",
    "control": "Controls",
}
HEAD = """# Methods

Made by `make docs` from the method classes, `vlm-fix published` and the result files in `results/`: do not edit.

- **Cost** is counted on a small random-weight LLaVA with one image (36 visual tokens, 47 in all) and 8 new tokens: rows
  that its decoder layers and its vision tower process, as multiples of the unwrapped model's. A contrast branch that
  shares what it can costs less than a second pass; a pruner less than one. Seconds are in `vlm-fix bench`.
- **Published** figures are the papers' own, each beside its own baseline ([C] read in official code, [P] the paper, [N] a
  lead); baselines differ between papers, so compare only within a line.
- **Measured** is ours on the bundled Picto models: a world of pictographs before models of 7 M (picto-llava) and 137 M
  parameters (picto-smol), not a claim about yours. Differences to the baseline of the same run in points, greedy unless it
  says sampled, with 95 % bootstrap intervals, bold where significant at 5 % after Holm's correction over the runs of that
  table.
"""
OPTIONS = {
    "var": ["detector=secondary"],
    "act": ["sinks=secondary"],
    "pai": ["gamma=1.1"],
}  # options that cost extra passes
CLAIMS = {
    "avar": "gains of 1 to 2 points with Qwen2.5-VL-7B are reported, on what benchmark is not known [N]",
    "dart": "88.9 % of the tokens pruned at comparable performance, the prompt 2.99 times as fast (the paper's abstract) [P]",
    "draft": "up to 1.94 times as fast on Video-LLMs, the same answers (the paper's abstract) [P]",
    "flowcut": "1.6 % above the best before it with LLaVA-1.5-7B at 88.9 % fewer tokens, 4.3 % with LLaVA-NeXT-7B at 94.4 % "
    "fewer, the prompt 3.2 times as fast (the paper's abstract) [P]",
    "sparc": "V* +6.7 points with Qwen3-VL-4B (the paper's abstract) [P]",
}
TINY = bench.Shape(
    "llava",
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 4},
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 96,
    },
    side=6,
    before=5,
    after=6,
)


def count(model: Any, inputs: dict[str, Any], spec: str, tokens: int = 8) -> tuple[float, float, float, float]:
    """Count rows through the decoder layers until the first token and per later token, images, and backward passes."""
    rows, images = [0.0], [0.0]

    def decoder(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        rows[0] += x.shape[0] * x.shape[1] / len(layers)

    def tower(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        images[0] += (args[0] if args else kwargs["pixel_values"]).shape[0]

    layers = model.model.language_model.layers
    parts, grad = [], mock.patch("torch.autograd.grad", wraps=torch.autograd.grad)
    for new in (1, 1 + tokens):
        rows[0], images[0] = 0.0, 0
        with warnings.catch_warnings(), vlm_fix.wrapped(model, spec):
            warnings.simplefilter("ignore")
            hooks = [layer.register_forward_pre_hook(decoder, with_kwargs=True) for layer in layers]
            hooks.append(model.model.vision_tower.register_forward_pre_hook(tower, with_kwargs=True))
            try:
                torch.manual_seed(0)
                with grad as backward:
                    model.generate(**inputs, max_new_tokens=new, do_sample=False)
            finally:
                for hook in hooks:
                    hook.remove()
        parts.append((rows[0], images[0], backward.call_count))
    return parts[0][0], (parts[1][0] - parts[0][0]) / tokens, parts[0][1], parts[1][2] / (1 + tokens)


def costs() -> dict[str, str]:
    """Return method name -> its counted cost in words."""
    model, inputs = bench.build(TINY, torch.device("cpu"), torch.float32)
    base, told = count(model, inputs, "baseline"), {}
    for method in vlm_fix.list_methods():
        spec = bench.spec_of(method.name)
        try:
            ours = count(model, inputs, spec)
        except VlmFixError:  # a file, heads or an image processor that the benchmark's random model has not
            told[method.name] = "not counted: it needs more than the random model that costs are counted on"
            continue
        parts = [f"prompt {ours[0] / base[0]:.2f}x", f"each later token {ours[1] / base[1]:.2f}x"]
        if ours[2] != base[2]:
            parts.append(f"vision tower {ours[2] / base[2]:.0f}x")
        if ours[3]:
            parts.append(f"{ours[3]:.1f} backward passes for each token")
        told[method.name] = ", ".join(parts)
        for option in OPTIONS.get(method.name, ()):
            first, later, *_ = count(model, inputs, f"{method.name}:{option}")
            told[method.name] += (
                f"; with `{option}` prompt {first / base[0]:.2f}x, each later token {later / base[1]:.2f}x"
            )
    return told


def _section(method: type[Method], cost: str, rows: Sequence[measured.Row]) -> Iterator[str]:
    yield f"### {method.name}"
    if method.paper:
        yield f"<{method.paper}>"
    yield "```text\n" + inspect.cleandoc(method.__doc__ or "") + "\n```"
    lines = ["| parameter | default | range | |", "|---|---|---|---|"]
    for f in dataclasses.fields(method):
        low, high, choices = (f.metadata.get(k) for k in ("low", "high", "choices"))
        span = ", ".join(map(str, choices)) if choices else _span(low, high)
        value = (
            "auto"
            if f.default is None
            else "|".join(map(str, f.default))
            if isinstance(f.default, tuple)
            else f.default
        )
        about = f.metadata.get("help", "").replace("|", "\\|")
        lines.append(f"| `{f.name}` | {str(value).replace('|', chr(92) + '|')} | {span} | {about} |")
    if len(lines) > 2:
        yield "\n".join(lines)
    yield f"Cost: {cost}."
    papers = [row for row in published.table() if method.name in row["method"].split("+")]
    if papers:
        lines = ["| published | model | its baseline > method | source |", "|---|---|---|---|"]
        for cells in map(published.cells, papers):
            name, where, model, figures, source = (_flat(cell) for cell in cells)
            lines.append(f"| `{name}`, {where} | {model} | {figures} | {source} |")
        yield "\n".join(lines)
    elif method.kind != "control" and (method.paper or "Source:" in (method.__doc__ or "")):
        yield f"Published: {CLAIMS.get(method.name, 'none stated in our sources')}."
    models = list(dict.fromkeys(row.model for row in rows))
    for model in models:
        yield f"Measured on {model}: {measured.verdict([row for row in rows if row.model == model])}"
    yield "\n".join(_measurements(rows)) if rows else "Measured: not yet."


def _measurements(rows: Sequence[measured.Row]) -> Iterator[str]:
    yield "| model | run | " + " | ".join(measured.COLUMNS) + " | results |"
    yield "|" + "---|" * (len(measured.COLUMNS) + 3)
    for row in rows:
        cells = (measured.points(row.figures.get(name), "**", "**") for name in measured.COLUMNS)
        yield f"| {row.model} | `{row.spec}` | " + " | ".join(cells) + f" | `results/{row.folder}` |"


def _flat(text: str) -> str:
    return text.replace("\n", "; ").replace("|", "\\|")


def _span(low: Any, high: Any) -> str:
    return (
        ""
        if low is None and high is None
        else f"{'' if low is None else low} to {'' if high is None else high}".strip()
    )


def page(results: Path) -> str:
    """Return the whole page as Markdown."""
    cost, ours = costs(), measured.read(results)
    parts = [HEAD.strip()]
    methods = [m for m in vlm_fix.list_methods() if m.name != "baseline"]
    kinds = [k for k in TITLES if any(m.kind == k for m in methods)]
    parts.append(
        "\n".join(
            f"- [{TITLES[k]}](#{TITLES[k].lower().replace(' ', '-')}): "
            + ", ".join(f"[{m.name}](#{m.name})" for m in methods if m.kind == k)
            for k in kinds
        )
    )
    parts.append(methods_table.NOTE.format(families=len(models_page.record()["families"])))
    parts.append("\n".join(methods_table.lines(methods, cost, ours)))
    for kind in kinds:
        parts.append(f"## {TITLES[kind]}")
        for method in methods:
            if method.kind == kind:
                parts += _section(method, cost[method.name], ours.get(method.name, []))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run the program; the module docstring describes its arguments."""
    write_atomic(Path(sys.argv[1]), page(Path("results")))
    measured.write(Path("results"))
