"""Pictures as HTML that carry their own pixels."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image


def picture(image: Image.Image, alt: str, quality: int = 88) -> str:
    """An <img> that carries its own pixels: nothing is written to disk."""
    data = io.BytesIO()
    image.save(data, "WEBP", quality=quality)
    source = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{html.escape(alt, quote=True)}" src="data:image/webp;base64,{source}">'


def figure(image: Image.Image, title: str, note: str, scale: tuple[str, ...] = ()) -> str:
    """A picture with its title and what can be read off it; scale: its colours ("heat" or "change") and their ends."""
    bar = ""
    if scale:
        ends = "".join(f"<span>{html.escape(end)}</span>" for end in scale[1:])
        bar = f'<div class="scale {scale[0]}"><i></i><div>{ends}</div></div>'
    caption = f"<b>{html.escape(title)}</b><span>{html.escape(note)}</span>{bar}"
    return f"<figure>{picture(image, f'{title}: {note}')}<figcaption>{caption}</figcaption></figure>"
