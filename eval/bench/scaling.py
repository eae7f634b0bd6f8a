"""How the cost of a method grows: `vlm-fix bench scaling` times it against the unwrapped model as one size after another grows.

Sizes: visual tokens of the prompt, edited layers, prompts in a batch, and tokens of the answer. Each point is the median over
rounds in which the unwrapped model runs right before the method. `slopes` compares how steeply the two grow: milliseconds a
token, seconds to the first one and MB of peak memory per unit of the size, by least squares. `memory_bend` is the peak memory
per visual token at the largest size over that at about half of it (8100 and 16384): about 1 where memory grows in proportion,
2 where with the square; without a size within a tenth of the half there is none. A method without the parameter `layers` is
left out along the edited layers, and `left_out` names it. `--rounds 0` measures memory alone, which no other program on the
machine changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import vlm_fix
from vlm_fix.errors import VlmFixError
from vlm_fix.registry import parse
from vlm_fix.whole import whole_file

from .clock import enough, peak_mb, timed
from .models import IMAGE, SHAPES, Shape, build
from .specs import spec_of

SIZES = {
    "visual": (64, 256, 576, 1024, 4096, 8100, 16384),
    "layers": (1, 2, 4, 8),
    "batch": (1, 2, 4),
    "answer": (8, 32, 128),
}
NAMES = {
    "visual": "visual tokens",
    "layers": "edited layers",
    "batch": "prompts in a batch",
    "answer": "tokens of the answer",
}


def run(
    specs: Sequence[str],
    shape: str = "small",
    *,
    sizes: Mapping[str, Sequence[int]] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    new_tokens: int = 16,
    rounds: int = 3,
    seed: int = 0,
    tick: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Measure `specs` on a shape along each of `sizes` and return settings, points, slopes and what was left out.

    Raises VlmFixError for bad sizes and for a spec that does not fit the model, before anything is timed.
    """
    if shape not in SHAPES:
        raise VlmFixError(f"--shape {shape!r} is not one of {', '.join(SHAPES)}.")
    enough(new_tokens, rounds, 0)
    chosen = {name: tuple(dict.fromkeys(SIZES[name] if sizes is None else sizes.get(name, ()))) for name in SIZES}
    for side in chosen["visual"]:
        if round(side**0.5) ** 2 != side:
            raise VlmFixError(f"--visual {side}: images are square here; give square numbers such as 64, 576 or 4096.")
    where, weights, points = torch.device(device), getattr(torch, dtype), list[dict[str, Any]]()
    depth = int(SHAPES[shape].text["num_hidden_layers"])
    chosen["layers"] = tuple(value for value in chosen["layers"] if value <= depth)
    specs_of = {
        what: [s for s in specs if what != "layers" or _layered(s)] for what, values in chosen.items() if values
    }
    left_out = [{"size": what, "spec": s} for what, own in specs_of.items() for s in specs if s not in own]
    if not any(specs_of.values()):
        raise VlmFixError(
            f"bench scaling has nothing to time: {', '.join(specs)} along {', '.join(specs_of) or 'no size that the model has'}; "
            "methods without the parameter layers need another size."
        )
    total = sum(len(own) * len(chosen[what]) for what, own in specs_of.items())
    checked = False
    for what, mine in specs_of.items():
        for value in chosen[what] if mine else ():
            own = SHAPES[shape]
            if what == "visual":
                own = dataclasses.replace(own, side=round(value**0.5))
            net, inputs = build(_long(own), where, weights, seed)
            if not checked:
                _check(net, [_full(s, depth, w, v) for w, each in specs_of.items() for v in chosen[w] for s in each])
                checked = True
            if what == "batch":
                inputs = {k: torch.cat([v] * value) for k, v in inputs.items()}
            tokens = value if what == "answer" else new_tokens
            plain = _memory(net, inputs, warm=rounds > 0)
            for spec in mine:
                full = _full(spec, depth, what, value)
                points.append(
                    {"size": what, "value": value, "spec": spec, **_point(net, inputs, full, plain, tokens, rounds)}
                )
                if tick:
                    tick(total)
    return {
        "bench": "scaling",
        "shape": shape,
        "dtype": dtype,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "seed": seed,
        "hardware": torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "versions": {
            "vlm-fix": vlm_fix.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "points": points,
        "slopes": slopes(points),
        "left_out": left_out,
    }


def _long(shape: Shape) -> Shape:
    """The same with positions for its whole prompt and answer."""
    return dataclasses.replace(shape, text={**shape.text, "max_position_embeddings": 32768})


def _layered(spec: str) -> bool:
    """Whether a method of the stack has the parameter `layers`."""
    return any("layers" in _names(part) for part in spec.split("+"))


def _names(part: str) -> list[str]:
    """The parameters of one method; none of a file of several."""
    methods = parse([part])
    return [field.name for field in dataclasses.fields(methods[0])] if len(methods) == 1 and part[0] != "@" else []


def _full(spec: str, depth: int, what: str, value: int) -> str:
    """The stack as it is timed at a size: of the edited layers with the first `value` layers, in each method that has them."""
    parts = [spec_of(part, depth) for part in spec.split("+")]
    if what == "layers":
        own = f"layers=0-{value - 1}"
        parts = [f"{p}{',' if ':' in p else ':'}{own}" if "layers" in _names(p) else p for p in parts]
    return "+".join(parts)


def _check(model: Any, specs: Sequence[str]) -> None:
    """Raise VlmFixError for a spec that the model cannot be wrapped with."""
    for spec in dict.fromkeys(specs):
        with _quietly(model, spec):
            pass


@contextlib.contextmanager
def _quietly(model: Any, spec: str) -> Iterator[None]:
    with warnings.catch_warnings(), vlm_fix.wrapped(model, spec.split("+")):
        warnings.simplefilter("ignore")
        yield


def _memory(model: Any, inputs: dict[str, Any], warm: bool = True) -> float:
    """Peak MB of an answer of two tokens; `warm`: after one that is not measured."""

    def short() -> None:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)

    if warm:
        short()
    return peak_mb(short, inputs["input_ids"].device)


def _point(model: Any, inputs: dict[str, Any], spec: str, plain_mb: float, tokens: int, rounds: int) -> dict[str, Any]:
    """One spec at one size: seconds to the first token, milliseconds a token and MB, of the model and of the method."""
    with _quietly(model, spec):
        made = {
            "visual_tokens": int((inputs["input_ids"][0] == IMAGE).sum()),
            "peak_mb": [plain_mb, _memory(model, inputs, warm=rounds > 0)],
        }
    if not rounds:
        return made
    pairs = []
    for _ in range(rounds):
        plain = timed(model, inputs, tokens)
        with _quietly(model, spec):
            pairs.append((plain, timed(model, inputs, tokens)))
    first = [[pair[i].first for pair in pairs] for i in (0, 1)]
    each = [[pair[i].speed for pair in pairs] for i in (0, 1)]
    return made | {
        "first_token": [statistics.median(x) for x in first],
        "ms_per_token": [1000 / statistics.median(x) for x in each],
        "first_token_ratio": statistics.median(b / a for a, b in zip(*first, strict=True)),
        "speed_ratio": statistics.median(b / a for a, b in zip(*each, strict=True)),
    }


def slopes(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per size and spec: the slopes [model, method] of milliseconds a token, first token and memory, and the memory's bend."""
    made = []
    for what, spec in dict.fromkeys((p["size"], p["spec"]) for p in points):
        own = sorted((p for p in points if (p["size"], p["spec"]) == (what, spec)), key=lambda p: p["value"])
        if len(own) < 2:
            continue
        x = [p["value"] for p in own]
        row: dict[str, Any] = {"size": what, "spec": spec}
        for name in (n for n in ("ms_per_token", "first_token", "peak_mb") if n in own[0]):
            row[name] = [_slope(x, [p[name][i] for p in own]) for i in (0, 1)]
        if what == "visual":
            last, half = own[-1], min(own[:-1], key=lambda p: abs(p["value"] - own[-1]["value"] / 2))
            if abs(half["value"] / last["value"] - 0.5) <= 0.05:
                row["memory_bend"] = [
                    last["peak_mb"][i] / last["value"] / (half["peak_mb"][i] / half["value"]) for i in (0, 1)
                ]
        made.append(row)
    return made


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line of least squares."""
    mx, my = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def figure(results: dict[str, Any], path: Path) -> None:
    """Draw first token, milliseconds a token and memory against each size: the model dashed, methods solid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = results["points"]
    sizes, specs = (list(dict.fromkeys(p[key] for p in points)) for key in ("size", "spec"))
    what = {"first_token": "first token, s", "ms_per_token": "ms a token", "peak_mb": "peak memory, MB"}
    what = {name: label for name, label in what.items() if name in points[0]}
    drawn, axes = plt.subplots(len(what), len(sizes), figsize=(3.2 * len(sizes), 2.4 * len(what)), squeeze=False)
    for column, size in enumerate(sizes):
        for row, (name, label) in enumerate(what.items()):
            ax = axes[row][column]
            for i, spec in enumerate(specs):
                own = sorted((p for p in points if (p["size"], p["spec"]) == (size, spec)), key=lambda p: p["value"])
                if not own:  # left out along this size
                    continue
                x = [p["value"] for p in own]
                if not ax.lines:
                    ax.plot(x, [p[name][0] for p in own], "k--", lw=1, label="model alone")
                ax.plot(
                    x, [p[name][1] for p in own], marker="o", ms=3, lw=1, color=f"C{i}", label=spec.partition(":")[0]
                )
            ax.set_ylim(bottom=0)
            ax.set_xscale("log", base=2)
            ax.set_ylabel(label if column == 0 else "")
            ax.set_xlabel(NAMES[size] if row == len(what) - 1 else "")
    axes[0][0].legend(frameon=False, fontsize="small")
    drawn.tight_layout()
    with whole_file(path) as part:
        drawn.savefig(part, format=path.suffix[1:])
    plt.close(drawn)


def table(results: dict[str, Any]) -> Any:
    """Format the points as a table for the terminal."""
    from rich import box
    from rich.table import Table

    out = Table(
        "size", "", "method", "first token", "tokens/s", "peak memory", box=box.SIMPLE_HEAD, title_justify="left"
    )
    out.title = f"{results['shape']}, {results['dtype']}, {results['rounds']} rounds, {results['hardware']}"
    for column in (out.columns[1], *out.columns[3:]):
        column.justify, column.no_wrap = "right", True
    for p in results["points"]:
        memory = p["peak_mb"][1] / p["peak_mb"][0]
        times = (f"{p[name]:.2f}" if name in p else "not timed" for name in ("first_token_ratio", "speed_ratio"))
        out.add_row(NAMES[p["size"]], str(p["value"]), p["spec"], *times, f"{memory:.2f}")
    if idle := [row["spec"] for row in results.get("left_out", ())]:
        out.caption = f"without the parameter layers, so not along the edited layers: {', '.join(idle)}"
    return out
