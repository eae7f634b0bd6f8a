"""Export: a method that is a change of weights, written into a plain checkpoint that any engine loads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from vlm_fix.calibrated import apply, choose
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import picto
from vlm_fix.eval.run import loading
from vlm_fix.families import arch_of
from vlm_fix.method import Method
from vlm_fix.registry import parse


def export(
    spec: str, out: str, model: str, dtype: str = "auto", device: str = "auto", calibration: Sequence[str] = ()
) -> dict[str, Any]:
    """Write `model` with the method `spec` in its weights to the folder `out`, with its processor; returns what was written.

    dtype "auto" is the checkpoint's own. Raises VlmFixError for a method that is no change of weights, for one without
    effect, and for a folder with something in it.
    """
    folder, methods = Path(out), parse(spec)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise VlmFixError(f"{out} is not an empty folder; give a new one for the checkpoint.")
    if len(methods) != 1:
        raise VlmFixError(f"{spec} is a stack; export writes one method: name one, and use the rest at run time.")
    if type(methods[0]).bake is Method.bake:  # before a model is loaded
        methods[0].bake(None)
    net, processor, _ = loading.load_model(model, own_dtype(model) if dtype == "auto" else dtype, device)
    (method,) = apply(choose(list(calibration), net, methods), methods, arch_of(net))
    if method.resolve(arch_of(net)).neutral:
        raise VlmFixError(f"{method.name} changes nothing with these settings; raise its strength.")
    method.bake(net)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # nobody reads half a checkpoint
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True) as draft:
        net.save_pretrained(draft)
        processor.save_pretrained(draft)
        os.chmod(draft, 0o755)
        os.replace(draft, folder)
    return {"method": method.name, "model": model, "out": str(folder), "dtype": str(net.dtype).removeprefix("torch.")}


def own_dtype(model: str) -> str:
    """The dtype of a checkpoint's weights; float32 where its configuration does not say."""
    path = str(picto.model_path(model)) if model.startswith("picto-") and not Path(model).exists() else model
    try:
        dtype = AutoConfig.from_pretrained(path).dtype
    except (OSError, ValueError):
        return "auto"  # loading says what is wrong
    return str(dtype or "float32").removeprefix("torch.")
