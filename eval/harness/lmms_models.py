"""lmms-eval's own chat models with a method applied: what `--model vlm_fix_llava_hf` and its siblings load.

Prompts, generation and batching are lmms-eval's. --model_args takes its arguments and two more: method (`harness.specs`)
and calibration (`harness.apply`). `pretrained` may also be a bundled model such as picto-llava. LLaVA runs one sample at
a time and all need decord, Qwen also qwen_vl_utils and torchvision: that is so in lmms-eval itself.
"""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from typing import Any

from vlm_fix.eval import picto

from . import inside as harness

CHAT = {"llava_hf": "LlavaHf", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3_VL"}  # module and class in lmms-eval


class Fixed:
    """Mixed into a model class of lmms-eval, which keeps the Hugging Face model in `self.model`."""

    model: Any

    def __init__(self, method: str = "baseline", calibration: str = "", **kwargs: Any):
        with harness.no_excuses():
            harness.specs(method)
            name = str(kwargs.get("pretrained", ""))
            if name.startswith("picto-") and not Path(name).exists():
                kwargs["pretrained"] = str(picto.model_path(name))
            super().__init__(**kwargs)
            harness.apply(self.model, method, calibration)


class FixedLlava(Fixed):
    """llava_hf gives device_map="" to from_pretrained, which transformers 5 refuses."""

    def __init__(self, device: str = "cuda", device_map: str = "", **kwargs: Any):
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # with more processes lmms-eval itself fills it in
            device_map = device_map or device
        super().__init__(device=device, device_map=device_map, **kwargs)


@functools.cache
def __getattr__(name: str) -> type:
    """VlmFixLlavaHf, VlmFixQwen2_5_VL, VlmFixQwen3_VL; each imports no more of lmms-eval than its own base."""
    for module, base in CHAT.items():
        if name == f"VlmFix{base}":
            theirs = getattr(importlib.import_module(f"lmms_eval.models.chat.{module}"), base)
            mixin = FixedLlava if base == "LlavaHf" else Fixed
            return type(name, (mixin, theirs), {"__module__": __name__})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
