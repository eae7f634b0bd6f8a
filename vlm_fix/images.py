"""Image files of the user's: read whole, in RGB, and bounded, whoever made them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlm_fix.errors import VlmFixError

if TYPE_CHECKING:
    from PIL import Image

REMEDY = "give a PNG or JPEG file."
MAX_PIXELS = 178_956_970  # Pillow's own limit, which a program around us may have lifted
REFUSED = ("EPS",)  # Pillow hands PostScript to Ghostscript, which is a program that runs programs


def read_image(path: str | Path, remedy: str = REMEDY, upright: bool = True, mode: str = "RGB") -> Image.Image:
    """The image of a file, `upright` as its EXIF data say. VlmFixError with `remedy` for what cannot be read."""
    from PIL import Image, ImageOps

    Image.init()  # only then are all formats known
    formats = [name for name in Image.OPEN if name not in REFUSED]
    try:
        with Image.open(path, formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return (ImageOps.exif_transpose(image) if upright else image).convert(mode)
    except Image.DecompressionBombError:
        cause = f"more than {MAX_PIXELS // 10**6} megapixels"
    except Exception as error:  # decoders raise what they like
        cause = type(error).__name__
    raise VlmFixError(f"{path} cannot be read as an image ({cause}): {remedy}")
