"""Model families: the table, image cells, position ids, and what differs between versions of transformers."""

from vlm_fix.arch import Arch, Family

from .cells import anyres_index, anyres_side, image_cells, split_pixels, visual_cells
from .parts import (
    attention_modules,
    final_norm,
    get_part,
    image_token_ids,
    language_head,
    output_projection,
    video_token_id,
    vision_blocks,
)
from .positions import prompt_positions
from .table import FAMILIES, REFUSED, arch_of, family_of

__all__ = [
    "FAMILIES",
    "REFUSED",
    "Arch",
    "Family",
    "anyres_index",
    "anyres_side",
    "arch_of",
    "attention_modules",
    "family_of",
    "final_norm",
    "get_part",
    "image_cells",
    "image_token_ids",
    "language_head",
    "output_projection",
    "prompt_positions",
    "split_pixels",
    "video_token_id",
    "vision_blocks",
    "visual_cells",
]
