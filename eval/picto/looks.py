"""Harder looks of Picto's scenes, asked for behind the name of a split: "shift+crowded", "test+small+large".

=======  ===========================================================================================================
crowded  8 to 12 objects instead of 3 to 7, each smaller (16 to 34 of 128 pixels), some of a kind
small    objects of 10 to 18 of 128 pixels, less than a patch wide on average
large    224-pixel scenes for patches of 14 pixels: 256 visual tokens instead of 64
=======  ===========================================================================================================

`crowded` decides what is in a scene and how large it is; `small` goes before it in size. The seed of a scene does not
depend on its look, so that `small` and `large` keep a scene's kind and its objects. Sprites have 64 pixels: in large scenes
the largest are magnified.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from vlm_fix.errors import VlmFixError


@dataclass(frozen=True)
class Look:
    """How the scenes of a split look; the default is the world as it always was, bit for bit."""

    crowded: bool = False
    small: bool = False
    large: bool = False

    @property
    def side(self) -> int:
        """The side of a scene in pixels."""
        return 224 if self.large else 128

    @property
    def patch(self) -> int:
        """The side of a model's patches in pixels: 8 x 8 patches, or 16 x 16 of a large scene."""
        return 14 if self.large else 16

    @property
    def patches(self) -> int:
        """How many patches a scene has."""
        return (self.side // self.patch) ** 2

    @property
    def counts(self) -> range:
        """How many objects a scene has, the first two likeliest."""
        return range(8, 13) if self.crowded else range(3, 8)

    @property
    def sizes(self) -> tuple[float, float]:
        """(half of the smallest side of an object, largest over smallest), in 1/128 of the scene's side."""
        if self.small:
            return 5, 1.8
        return (8, 2.13) if self.crowded else (11, 2.36)

    @property
    def least(self) -> int:
        """The side, in 1/128, below which an object is not shrunk to find room."""
        return 10 if self.small else 14 if self.crowded else 20

    def scaled(self, size: int) -> int:
        """Pixels of 128 in pixels of this look's scenes."""
        return size * self.side // 128

    def __str__(self) -> str:
        return "".join(f"+{field.name}" for field in fields(self) if getattr(self, field.name))


DEFAULT = Look()


def read(name: str) -> tuple[str, Look]:
    """Split "shift+crowded" into the split and its look. Raises VlmFixError for an unknown word.

    >>> read("shift+large+crowded")
    ('shift', Look(crowded=True, small=False, large=True))
    """
    split, *words = name.split("+")
    known = [field.name for field in fields(Look)]
    unknown = [word for word in words if word not in known]
    if unknown:
        raise VlmFixError(f"unknown look {unknown[0]!r} of Picto's scenes: choose from {', '.join(known)}.")
    return split, Look(**dict.fromkeys(words, True))
