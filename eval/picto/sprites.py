"""The sprites of the Picto world: COCO category -> emoji, and the program that made the PNGs in sprites/.

Drawing scenes only needs `load`. `python -m vlm_fix.eval.picto.sprites` rebuilds sprites/ from a Noto Color Emoji
font and from the npm packages emoji-datasource-twitter and @lobehub/fluent-emoji-3d (see sprites/ATTRIBUTION.md).
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm_fix.errors import VlmFixError

ROOT = Path(__file__).parent / "sprites"
STYLES = ("noto", "twemoji", "fluent")
HELD_OUT_STYLE = "fluent"
SIZE = 64

#: COCO category -> the emoji that draw it (64 of the 80 categories have at least one)
EMOJI: dict[str, str] = {
    "person": "👩 👨 👦 👧 🧍",
    "bicycle": "🚲",
    "car": "🚗 🚙",
    "motorcycle": "🏍 🛵",
    "airplane": "✈ 🛩",
    "bus": "🚌",
    "train": "🚆 🚂",
    "truck": "🚚 🚛",
    "boat": "⛵ 🚤",
    "traffic light": "🚦",
    "stop sign": "🛑",
    "bird": "🐦",
    "cat": "🐈 🐱",
    "dog": "🐕 🐶",
    "horse": "🐎 🐴",
    "sheep": "🐑",
    "cow": "🐄 🐮",
    "elephant": "🐘",
    "bear": "🐻",
    "zebra": "🦓",
    "giraffe": "🦒",
    "backpack": "🎒",
    "umbrella": "☂",
    "handbag": "👜",
    "tie": "👔",
    "suitcase": "🧳",
    "frisbee": "🥏",
    "skis": "🎿",
    "sports ball": "⚽ 🏀",
    "kite": "🪁",
    "skateboard": "🛹",
    "tennis racket": "🏸",
    "bottle": "🍾",
    "wine glass": "🍷",
    "cup": "☕",
    "knife": "🔪",
    "spoon": "🥄",
    "bowl": "🥣",
    "banana": "🍌",
    "apple": "🍎",
    "sandwich": "🥪",
    "orange": "🍊",
    "broccoli": "🥦",
    "carrot": "🥕",
    "hot dog": "🌭",
    "pizza": "🍕",
    "donut": "🍩",
    "cake": "🍰 🎂",
    "chair": "🪑",
    "couch": "🛋",
    "potted plant": "🪴",
    "bed": "🛏",
    "toilet": "🚽",
    "tv": "📺",
    "laptop": "💻",
    "mouse": "🖱",
    "keyboard": "⌨",
    "cell phone": "📱",
    "book": "📕 📗",
    "clock": "⏰",
    "vase": "🏺",
    "scissors": "✂",
    "teddy bear": "🧸",
    "toothbrush": "🪥",
}


@cache
def load(style: str) -> dict[str, list[Image.Image]]:
    """Return category -> its sprites of one style, 64 x 64 RGBA images in the order of EMOJI."""
    if style not in STYLES:
        raise VlmFixError(f"unknown sprite style {style!r}: choose one of {', '.join(STYLES)}.")
    out = {}
    for name, emoji in EMOJI.items():
        files = [ROOT / style / _file(name, i) for i in range(len(emoji.split()))]
        out[name] = [Image.open(f).convert("RGBA") for f in files]
    return out


def _file(name: str, i: int) -> str:
    return f"{name.replace(' ', '_')}{'' if i == 0 else f'_{i + 1}'}.png"


def _square(img: Image.Image) -> Image.Image:
    """Crop to the visible part, centre on a square and resize to SIZE."""
    img = img.convert("RGBA")
    img = img.crop(img.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox())
    side = max(img.size)
    out = Image.new("RGBA", (side, side))
    out.paste(img, ((side - img.width) // 2, (side - img.height) // 2))
    return out.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _noto(font: ImageFont.FreeTypeFont, emoji: str) -> Image.Image:
    img = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(img).text((8, 8), emoji, font=font, embedded_color=True)
    return img


def _from_package(folder: Path, emoji: str) -> Image.Image:
    code = f"{ord(emoji):x}"
    for f in (p for stem in (code, f"{code}-fe0f") for p in folder.glob(f"{stem}.*")):
        return Image.open(f)
    raise VlmFixError(f"{folder} has no image for {emoji} ({code}): use the package version that ATTRIBUTION.md names.")


def build(noto: Path, twemoji: Path, fluent: Path) -> None:
    """Write every sprite of every style (``noto``: the .ttf; the others: folders of images named by code point)."""
    font = ImageFont.truetype(str(noto), 109)
    for name, emoji in EMOJI.items():
        for i, e in enumerate(emoji.split()):
            images = (_noto(font, e), _from_package(twemoji, e), _from_package(fluent, e))
            for style, img in zip(STYLES, images, strict=True):
                (ROOT / style).mkdir(parents=True, exist_ok=True)
                _square(img).save(ROOT / style / _file(name, i), optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rebuild the Picto sprites.")
    for source in STYLES:
        parser.add_argument(f"--{source}", type=Path, required=True)
    build(**vars(parser.parse_args()))
