"""Draw docs/images/captions.svg, the picture of the README: one scene, its caption by the bundled model, and with a method.

    python docs/figures/captions.py [SCENE] [METHOD]

The image is Picto's, the answers are made here and now, and the words are marked by CHAIR's rules: nothing is written by hand.
"""

from __future__ import annotations

import base64
import html
import io
import sys
from pathlib import Path

from vlm_fix.eval import picture

PLACE = Path(__file__).resolve().parents[1] / "images" / "captions.svg"
PROMPT = "Please describe this image in detail."  # as in the README
WIDTH, SIDE, LETTERS = 880, 256, 52
STYLE = """
text{font:17px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#1b1f24}.head{font-size:14px;fill:#5c6670}
.good{fill:#0b6b3a;font-weight:600}.bad{fill:#b3170d;font-weight:600;text-decoration:underline wavy}
.card{fill:#f6f8fa;stroke:#d9dee3}
@media (prefers-color-scheme:dark){text{fill:#e6e9ec}.head{fill:#9aa5b1}.good{fill:#8be0b0}.bad{fill:#ff9a8c}
.card{fill:#1d2228;stroke:#343b43}}"""


def lines(answer: picture.Answer, truth: frozenset[str]) -> list[str]:
    """The answer in lines of SVG, its objects marked."""
    marks, out, width = {start: (end, right) for start, end, _, right in answer.marks(truth)}, [""], 0
    at, text = 0, answer.text
    while at < len(text):
        end, right = marks.get(at, (0, None))
        if not end:
            end = min([text.find(" ", at) + 1 or len(text), *(start for start in marks if start > at)])
        word = html.escape(text[at:end])
        if width + end - at > LETTERS:
            out.append("")
            width = 0
        kind = {True: "good", False: "bad"}.get(right)  # type: ignore[arg-type]
        out[-1] += f'<tspan class="{kind}">{word}</tspan>' if kind else word
        width, at = width + end - at, end
    return out


def draw(scene: int, method: str) -> str:
    """The SVG."""
    shown = picture.find(f"scene:{scene}")
    assert shown.truth is not None
    packed = io.BytesIO()
    shown.image.save(packed, "PNG")
    drawn, y = [], 34
    answers = list(picture.ask(shown.image, PROMPT, [["baseline"], [method]], max_new_tokens=64))
    for answer, name in zip(answers, ("picto-llava", f'picto-llava with vlm_fix.wrap(model, "{method}")'), strict=True):
        made = lines(answer, shown.truth)
        height = 46 + 26 * len(made)
        drawn.append(
            f'<rect class="card" x="{SIDE + 40}" y="{y - 24}" width="{WIDTH - SIDE - 52}" height="{height}" rx="8"/>'
        )
        drawn.append(f'<text class="head" x="{SIDE + 58}" y="{y}">{html.escape(name)}</text>')
        for i, line in enumerate(made):
            drawn.append(f'<text x="{SIDE + 58}" y="{y + 30 + 26 * i}" xml:space="preserve">{line}</text>')
        y += height + 14
    drawn.append(f'<text class="head" x="{SIDE + 58}" y="{y}">green: in the image; red: not there</text>')
    height = max(y + 14, SIDE + 20)
    code = base64.b64encode(packed.getvalue()).decode()
    told = html.escape("; ".join(f"{a.method}: {a.text}" for a in answers))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"><title>{told}</title>'
        f'<style>{STYLE}</style><image x="10" y="10" width="{SIDE}" height="{SIDE}" href="data:image/png;base64,{code}"/>'
        f"{''.join(drawn)}</svg>\n"
    )


if __name__ == "__main__":
    given = sys.argv[1:]
    PLACE.write_text(draw(int(given[0]) if given else 0, given[1] if len(given) > 1 else "vcd"))
    print(PLACE)
