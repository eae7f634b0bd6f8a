"""Draw docs/images/architecture.png from the code: the steps of a call, the wings, one edited layer, the floors.

Steps are read from the source of `generate` and of the hook before a forward, wings from their registry, floors from the
imports of the core's modules. Only the words beside the steps and the layer's picture are written here.

    python docs/figures/architecture.py
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import vlm_fix
from vlm_fix import engine, forwards
from vlm_fix.wing import Wing

HERE = Path(__file__).resolve().parent
CORE = Path(vlm_fix.__file__).parent
INK, PALE, BLUE, GREEN, ORANGE = "#1f2933", "#eef2f6", "#cfe3f7", "#d5efdc", "#fde3c3"
HOOKS = ("check", "install", "refuse", "around_generate", "on_prompt", "enter", "only_in_generate", "unused")
WORDS = {
    "GenerateOptions.read": "the arguments, read once",
    "engine.rests": "no image: the model answers alone",
    "engine.refuse": "what cannot be served stops here",
    "Call": "this call: the prompt's inputs",
    "engine.during": "forwards now belong to it",
    "wing.around_generate": "second branches, processors, loops",
    "engine.plain_generate": "transformers' own generate",
    "engine.refuse_broken": "scores that are no numbers are an error",
    "engine.report_unused": "a warning if a method changed nothing",
    "engine.keep": "the session of a kept cache",
    "finish": "the caller's own prompt in the output",
    "self._refuse_forward": "no attention weights, no packed rows",
    "self.classify": "new columns: text or image",
    "self._check_cacheless": "a lost cache is an error",
    "self._open": "a new KV cache: a new Session",
    "self._advance": "columns, padding; on_prompt if it is new",
    "wing.enter": "other arguments for this forward",
}


# ---------------------------------------------------------------------------------------------------- read from the code


def steps(function: Callable[..., Any]) -> list[str]:
    """The calls in a function's source that WORDS knows, in their order."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls.sort(key=lambda node: (node.lineno, node.col_offset))
    return list(dict.fromkeys(name for node in calls if (name := ast.unparse(node.func)) in WORDS))


def asks_wings(name: str) -> bool:
    """True if a step asks every wing: one of theirs, or a step of the engine that goes through them."""
    method = getattr(engine.Engine, name.removeprefix("engine."), None)
    return name.startswith("wing.") or (method is not None and "self.wings" in inspect.getsource(method))


def overrides(wing: type[Wing]) -> set[str]:
    """Which of the host's calls a wing answers."""
    return {hook for hook in HOOKS if getattr(wing, hook) is not getattr(Wing, hook)}


def imports() -> dict[str, set[str]]:
    """{part: the parts it imports when it is imported}; a part is a module or a folder of the core."""
    parts = {
        p.stem if p.is_file() else p.name for p in CORE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    parts -= {"__init__", "cli"}
    found: dict[str, set[str]] = {part: set() for part in parts}
    for part in parts:
        home = CORE / part
        for path in sorted(home.rglob("*.py")) if home.is_dir() else [home.with_suffix(".py")]:
            package = ["vlm_fix", *path.relative_to(CORE).with_suffix("").parts][:-1]
            for node in ast.parse(path.read_text()).body:  # top level: not under TYPE_CHECKING, not inside functions
                if isinstance(node, ast.ImportFrom):
                    base = package[: len(package) - node.level + 1] if node.level else []
                    names = [*base, *(node.module or "").split(".")] if node.module else base
                    for alias in node.names:
                        found[part] |= {name for name in [*names, alias.name][1:2] if names[:1] == ["vlm_fix"]}
                elif isinstance(node, ast.Import):
                    found[part] |= {a.name.split(".")[1] for a in node.names if a.name.startswith("vlm_fix.")}
    return {part: (used & parts) - {part} for part, used in found.items()}


def floors(graph: dict[str, set[str]]) -> list[list[str]]:
    """Parts by how many floors lie below them; parts that import each other share a floor."""

    def reach(part: str) -> set[str]:
        seen, queue = set(), [part]
        while queue:
            for used in graph[queue.pop()] - seen:
                seen.add(used)
                queue.append(used)
        return seen

    below = {part: reach(part) for part in graph}
    level: dict[str, int] = {}
    for part in sorted(graph, key=lambda p: len(below[p])):
        circle = {p for p in below[part] if part in below[p]}
        level[part] = 1 + max((level.get(p, 0) for p in below[part] - circle), default=-1)
    for part in graph:
        level[part] = max([level[part], *(level[p] for p in below[part] if part in below[p])])
    return [sorted(p for p in graph if level[p] == n) for n in range(max(level.values()) + 1)]


# ---------------------------------------------------------------------------------------------------------------- drawing


def box(
    ax: Any, x: float, y: float, w: float, h: float, text: str, color: str = PALE, note: str = "", **kw: Any
) -> None:
    ax.add_patch(FancyBboxPatch((x, y), w, h, "round,pad=0,rounding_size=0.012", fc=color, ec=INK, lw=0.8))
    kw = {"ha": "center", "va": "center", "color": INK, "fontsize": 8.5, **kw}
    ax.text(x + w / 2, y + h * (0.66 if note else 0.5), text, **kw)
    if note:
        ax.text(x + w / 2, y + h * 0.27, note, **{**kw, "fontsize": 7, "family": "sans-serif", "color": "#52606d"})


def arrow(ax: Any, start: tuple[float, float], end: tuple[float, float], **kw: Any) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=INK, lw=0.9, **kw))


def column(ax: Any, x: float, w: float, names: list[str], top: float, bottom: float, color: str) -> list[float]:
    """Boxes from top to bottom with arrows between them; the middle height of each."""
    pitch = (top - bottom) / len(names)
    h, middles = pitch * 0.72, []
    for i, name in enumerate(names):
        y = top - (i + 1) * pitch + (pitch - h) / 2
        shown = name.removeprefix("self.").removeprefix("engine.")
        box(ax, x, y, w, h, shown, GREEN if asks_wings(name) else color, WORDS[name], family="monospace")
        if i:
            arrow(ax, (x + w / 2, y + pitch), (x + w / 2, y + h))
        middles.append(y + h / 2)
    return middles


def draw_call(ax: Any) -> None:
    ax.set_title("One call: generate, and each forward in it", loc="left", fontsize=11, weight="bold", color=INK)
    call, forward = steps(engine.generate), steps(forwards.Forwards._entered)
    left = column(ax, 0.02, 0.44, call, 0.98, 0.0, BLUE)
    forward += ["layers", "logits"]
    WORDS.update({"layers": "attention, MLP: see One layer", "logits": "processors: contrast, logit edits; a token"})
    right = column(ax, 0.56, 0.42, forward, 0.9, 0.0, PALE)
    ax.text(
        0.77, 0.94, "every forward (green: every wing is asked)", ha="center", fontsize=8.5, style="italic", color=INK
    )
    where = left[call.index("engine.plain_generate")]
    arrow(ax, (0.46, where), (0.56, right[0]))
    arrow(ax, (0.56, right[-1]), (0.46, where - 0.015), linestyle="--")


def draw_wings(ax: Any) -> None:
    ax.set_title("The wings, in the order in which they are called", loc="left", fontsize=11, weight="bold", color=INK)
    height, left, right = 1 / (len(Wing.kinds) + 1.6), 0.34, 0.94
    x = {hook: left + (right - left) * (i + 0.5) / len(HOOKS) for i, hook in enumerate(HOOKS)}
    for hook in HOOKS:
        ax.text(
            x[hook] - 0.03,
            1 - height * 1.2,
            hook,
            rotation=35,
            rotation_mode="anchor",
            fontsize=7,
            family="monospace",
        )
    for i, wing in enumerate(Wing.kinds):
        y = 1 - height * (i + 2.1)
        home = wing.__module__.removeprefix("vlm_fix.").replace(".", "/") + ".py"
        box(ax, 0.02, y, 0.28, height * 0.76, wing.__name__, GREEN, home, family="monospace")
        for hook in HOOKS:
            full = hook in overrides(wing)
            ax.plot(x[hook], y + height * 0.38, "o", ms=8, mfc="#2f855a" if full else "white", mec="#9aa5b1", mew=0.8)


def draw_layer(ax: Any) -> None:
    ax.set_title("One layer: the rows that a method edits", loc="left", fontsize=11, weight="bold", color=INK)
    box(ax, 0.02, 0.70, 0.17, 0.2, "query, key,\nvalue")
    box(ax, 0.27, 0.70, 0.2, 0.2, "SDPA", BLUE, "all rows")
    box(ax, 0.55, 0.70, 0.2, 0.2, "edited rows", ORANGE, "written over it")
    box(ax, 0.82, 0.70, 0.16, 0.2, "o_proj,\nMLP", PALE)
    for a, b in ((0.19, 0.27), (0.47, 0.55), (0.75, 0.82)):
        arrow(ax, (a, 0.8), (b, 0.8))
    chain = ["scores of\nR rows", "edits of\nscores", "mask,\nsoftmax", "edits of\nweights", "edits of\nheads"]
    for i, text in enumerate(chain):
        x = 0.02 + i * 0.195
        box(ax, x, 0.3, 0.16, 0.22, text, ORANGE if "edits" in text else PALE)
        if i:
            arrow(ax, (x - 0.035, 0.41), (x, 0.41))
    arrow(ax, (0.105, 0.70), (0.1, 0.52))
    arrow(ax, (0.88, 0.52), (0.68, 0.70), connectionstyle="arc3,rad=0.12")
    ax.text(
        0.02,
        0.17,
        "float32; R is 1 while decoding; no matrix of all rows by all columns is ever formed.\n"
        "Factors by column or by head need no weights and stay on SDPA.\n"
        "Rows that no method edits keep SDPA's output bit for bit.\n"
        "Hidden-state edits hook the outputs of attention, MLP and layers.",
        fontsize=7.5,
        color="#52606d",
        va="top",
    )


def draw_floors(ax: Any) -> None:
    ax.set_title("The floors of the core: who imports whom", loc="left", fontsize=11, weight="bold", color=INK)
    graph = imports()
    levels = floors(graph)
    height, place = 1 / len(levels), {}
    for n, parts in enumerate(levels):
        room, letters = 0.98 - 0.02 * len(parts), sum(len(part) + 1.5 for part in parts)
        widths = [min(0.2, room * (len(part) + 1.5) / letters) for part in parts]  # on a full floor, as names are long
        x = 0.5 - (sum(widths) + 0.02 * (len(parts) - 1)) / 2
        for part, w in zip(parts, widths, strict=True):
            place[part] = (x, n * height + 0.012, w, height * 0.62)
            x += w + 0.02
    for part, used in graph.items():
        shown = {u for u in used if not any(u in graph[v] and part not in graph[v] for v in used - {u})}
        for u in shown:  # arrows that follow from others are left out
            (x, y, w, _), (x2, y2, w2, h2) = place[part], place[u]
            if y > y2:
                ax.plot([x + w / 2, x2 + w2 / 2], [y, y2 + h2], color="#9aa5b1", lw=0.7, zorder=0)
    for part, (x, y, w, h) in place.items():
        folder = (CORE / part).is_dir()
        box(ax, x, y, w, h, part + "/" * folder, BLUE if folder else PALE, fontsize=7.5, family="monospace")


def main() -> None:
    fig, axes = plt.subplots(
        2, 2, figsize=(13.5, 12), gridspec_kw={"height_ratios": (1.25, 1), "hspace": 0.12, "wspace": 0.06}
    )
    for ax, draw in zip(axes.flat, (draw_call, draw_wings, draw_layer, draw_floors), strict=True):
        ax.set(xlim=(0, 1), ylim=(0, 1))
        ax.axis("off")
        draw(ax)
    out = HERE.parent / "images" / "architecture.png"
    fig.savefig(out, dpi=130, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    print(out)


if __name__ == "__main__":
    main()
