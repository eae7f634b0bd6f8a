"""lmms-eval's own chat models with a method applied: the classes of `--model vlm_fix_llava_hf` and the like.

Prompts, generation and batching are lmms-eval's. --model_args has two more arguments: method (see `inside.specs`) and
calibration (see `inside.apply`). `pretrained` may also be a bundled model such as picto-llava. As in lmms-eval itself,
LLaVA runs one sample at a time, all models need decord, and Qwen also qwen_vl_utils and torchvision.
"""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from typing import Any

from vlm_fix.eval import picto

from . import inside

CHAT = {"llava_hf": "LlavaHf", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3_VL"}  # module and class in lmms-eval


class Fixed:
    """Mixin for model classes of lmms-eval, which keep the Hugging Face model in `self.model`."""

    model: Any

    def __init__(self, method: str = "baseline", calibration: str = "", **kwargs: Any):
        with inside.exit_on_failure():
            inside.specs(method)
            name = str(kwargs.get("pretrained", ""))
            if name.startswith("picto-") and not Path(name).exists():
                kwargs["pretrained"] = str(picto.model_path(name))
            super().__init__(**kwargs)
            inside.apply(self.model, method, calibration)


class FixedLlava(Fixed):
    """Works around llava_hf, which passes device_map="" to from_pretrained; transformers 5 refuses that."""

    def __init__(self, device: str = "cuda", device_map: str = "", **kwargs: Any):
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # with more processes lmms-eval sets it itself
            device_map = device_map or device
        super().__init__(device=device, device_map=device_map, **kwargs)


@functools.cache
def __getattr__(name: str) -> type:
    """Create VlmFixLlavaHf, VlmFixQwen2_5_VL or VlmFixQwen3_VL, importing only its own base from lmms-eval."""
    for module, base in CHAT.items():
        if name == f"VlmFix{base}":
            theirs = getattr(importlib.import_module(f"lmms_eval.models.chat.{module}"), base)
            mixin = FixedLlava if base == "LlavaHf" else Fixed
            return type(name, (mixin, theirs), {"__module__": __name__})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
