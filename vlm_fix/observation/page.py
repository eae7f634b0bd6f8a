"""An Inspection as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .inspection import Inspection

STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1d1f24}
h2{margin:2.2rem 0 .3rem}p{max-width:46rem}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:12px}
td,th{padding:2px 6px;white-space:nowrap;border:1px solid #e3e5ea}th{font-weight:600;text-align:left;background:#f5f6f8}
td[style]{background:hsl(var(--h) 80% calc(100% - 48% * var(--s)))}
td.n{text-align:right;font-variant-numeric:tabular-nums}td.own{outline:2px solid #0a7d38;outline-offset:-2px}
.maps{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0}figcaption{font-size:12px}img{border-radius:4px;display:block}"""
PARTS = ("attention", "MLP", "hidden state")


def page(
    found: Inspection,
    words: Sequence[str],
    names: Mapping[int, str],
    cells: Sequence[torch.Tensor],
    pictures: Sequence[Any],
    title: str,
    prompt: str,
) -> str:
    """words: the text of every id of `found.ids`, names: of the lens's ids; cells, pictures (PIL): see `Observation.cells`."""
    answer = [shown(w) for w in words[found.prompt_len :]]
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{shown(title)}</title><style>{STYLE}</style><h1>{shown(title)}</h1>",
        f"<p><b>Prompt</b> {shown(prompt)}<br><b>Answer</b> {shown(''.join(words[found.prompt_len :]))}</p>",
        *lens(found, names, answer),
        *_maps(found, answer, cells, pictures),
        *saliency(found, words, answer),
        *_effects(found, words),
        *heads(found),
        *sinks(found),
    ]
    return "\n".join(parts)


def shown(text: str) -> str:
    """Text for a page; line ends can be seen."""
    return html.escape(text.replace("\n", "⏎"))


def tint(share: float, hue: int = 215) -> str:
    """A cell's colour, for the page's style: from none (0) to full (1)."""
    share = min(max(share, 0.0), 1.0)
    return f"--s:{share:.2f};--h:{hue}"


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th>{h}</th>" for h in head)
    return f"<div class=wide><table><tr>{cells}</tr>{''.join(rows)}</table></div>"


def lens(found: Inspection, vocabulary: Mapping[int, str], answer: list[str]) -> list[str]:
    """answer: its words as HTML, of `shown`."""
    rows, tokens = [], found.tokens
    for i in range(len(found.lens_tokens) - 1, -1, -1):
        name = "answer" if i == len(found.lens_tokens) - 1 else f"into {i}"
        row = [f"<th>{name}</th>"]
        for t in range(len(answer)):
            top, p = int(found.lens_tokens[i, t, 0]), float(found.lens_p[i, t, 0])
            own = " class=own" if top == int(tokens[t]) else ""
            more = ", ".join(
                f"{vocabulary.get(int(k), str(int(k)))} {float(q):.2f}"
                for k, q in zip(found.lens_tokens[i, t], found.lens_p[i, t], strict=True)
            )
            row.append(f'<td{own} style="{tint(p)}" title="{shown(more)}">{shown(vocabulary.get(top, str(top)))}</td>')
        rows.append(f"<tr>{''.join(row)}</tr>")
    said = [
        f"{word.strip() or '(blank)'}: "
        + ("only in the answer" if (layer := found.appears(t)) is None else f"from layer {layer} on")
        for t, word in enumerate(answer)
    ]
    about = (
        "<h2>What each layer would say</h2><p>The final norm and the language head on the input of each layer (logit lens). "
        "Framed: the token that the model said. Stronger blue: more probable. Hold the pointer over a cell for more tokens.</p>"
    )
    return [about, _table(["", *answer], rows), f"<p>Said by all later layers too: {'; '.join(said)}.</p>"]


def _maps(found: Inspection, answer: list[str], cells: Sequence[torch.Tensor], pictures: Sequence[Any]) -> list[str]:
    if found.rollout is None or not cells:
        return []
    on_image, figures = found.rollout[:, found.visual], []
    for number, (grid, picture) in enumerate(zip(cells, pictures, strict=False)):
        every = on_image[:, grid.clamp(min=0)] * (grid >= 0)
        peak = float(every.max()) or 1.0
        for t, word in enumerate(answer):
            source = _overlay(picture, every[t] / peak)
            label = f"{word.strip() or '(blank)'} · {float(on_image[t].sum()):.1%}" + (
                f" · image {number + 1}" if len(cells) > 1 else ""
            )
            figures.append(
                f'<figure><img alt="rollout of {word}" src="{source}"><figcaption>{label}</figcaption></figure>'
            )
    about = (
        "<h2>Attention rollout</h2><p>Where a token's row leads back to when the attention of all layers is multiplied, "
        "half of each layer being its residual. Below each map: the share that ends on the image. It follows "
        "attention alone, not what is read.</p>"
    )
    return [about, f"<div class=maps>{''.join(figures)}</div>"]


def _overlay(picture: Any, heat: torch.Tensor) -> str:
    from PIL import Image

    side = (150, round(150 * picture.height / picture.width))
    under = picture.convert("RGB").resize(side)
    levels = (heat.clamp(0, 1) * 200).to(torch.uint8)
    mask = Image.frombytes("L", (heat.shape[1], heat.shape[0]), bytes(levels.flatten().tolist())).resize(side)
    under.paste(Image.new("RGB", side, (225, 30, 40)), mask=mask)
    data = io.BytesIO()
    under.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def saliency(found: Inspection, words: Sequence[str], answer: list[str]) -> list[str]:
    if found.saliency is None:
        return []
    total = found.saliency.sum(dim=0)  # [n, K]
    columns = [j for j in range(total.shape[1]) if not bool(found.visual[j])]
    rows = []
    for t, word in enumerate(answer):
        peak = float(total[t].max()) or 1.0
        cells = [
            float(total[t, found.visual].sum()),
            *(float(total[t, j]) for j in columns if j < found.prompt_len + t),
        ]
        row = "".join(f'<td class=n style="{tint(x / max(peak, cells[0]))}">{x:.3f}</td>' for x in cells)
        rows.append(f"<tr><th>{word}</th>{row}</tr>")
    about = (
        "<h2>Saliency</h2><p>|A dL/dA| of the row that says each token, L = -log p of it, mean over heads "
        "and summed over layers: what the "
        "token hangs on. The first column is the image as a whole.</p>"
    )
    return [about, _table(["", "image", *(shown(words[j]) for j in columns)], rows)]


def _effects(found: Inspection, words: Sequence[str]) -> list[str]:
    if found.effects is None:
        return []
    effects, made = found.effects, []
    names = ["image" if bool(found.visual[a]) else shown("".join(words[a:b]))[-24:] for a, b in effects.places]
    for part, rates in zip(PARTS, effects.rates, strict=True):
        rows = [
            f"<tr><th>{i}</th>"
            + "".join(f'<td class=n style="{tint(float(x), 150)}">{float(x):.2f}</td>' for x in layer)
            + "</tr>"
            for i, layer in enumerate(rates)
        ]
        made.append(f"<h3>{part}</h3>" + _table(["layer", *names], rows))
    about = (
        f"<h2>Causal map</h2><p>The token's probability is {effects.clean:.3f}, and {effects.noised:.3f} with "
        f"a noised image. Each number is the "
        "share of the loss that returns when this output of the clean run is put into the noised one. Methods are off.</p>"
    )
    return [about, *made]


def heads(found: Inspection, most: int = 12) -> list[str]:
    made = []
    for name, table in (("copy the next token", found.copying), ("look at the image", found.looking)):
        heads = [divmod(k, table.shape[1]) for k in range(table.numel())]
        heads.sort(key=lambda at: (-float(table[at]), -float(found.image_mass[at])))
        chosen = [at for at in heads[:most] if float(table[at]) > 0]
        if not chosen:
            made.append(f"<h3>Heads that {name}</h3><p>None: in no head is that the largest weight of a row.</p>")
            continue
        rows = []
        for layer, head in chosen:
            value, mass = float(table[layer, head]), float(found.image_mass[layer, head])
            rows.append(f"<tr><td>{layer}.{head}</td><td class=n>{value:.2f}</td><td class=n>{mass:.2f}</td></tr>")
        made.append(
            f"<h3>Heads that {name}</h3>"
            + _table(["layer.head", "share of the answer's rows", "weight on the image"], rows)
        )
    about = "<h2>Heads</h2><p>By where the largest weight of a row lies: on the very token that comes next, or on the image.</p>"
    return [about, *made]


def sinks(found: Inspection) -> list[str]:
    rows = [
        f"<tr><td class=n>{i}</td><td class=n>{float(phi):.1f}</td><td class=n>{int(text)}</td><td class=n>{int(image)}</td>"
        f'<td class=n style="{tint(float(mass))}">{float(mass):.2f}</td></tr>'
        for i, (phi, (text, image), mass) in enumerate(zip(found.phi, found.sinks, found.sink_mass, strict=True))
    ]
    about = (
        "<h2>Sinks</h2><p>Columns with a massive activation when they enter a layer (largest |x_d| / rms(x) "
        "above 20), and the attention that "
        "the answer gives them.</p>"
    )
    return [about, _table(["layer", "largest", "text sinks", "image sinks", "weight on sinks"], rows)]
