"""Directions and subspaces made elsewhere, read from safetensors by their published layouts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlm_fix import Arch, VlmFixError
from vlm_fix.tensors import Tensors, read_tensors

Source = str | Tensors
REPSTEER = ("manifest.json", "tensors.safetensors")
COMPONENTS = (
    (("attn", "attention"), "attention_output"),
    (("mlp", "ffn"), "mlp_output"),
    (("resid", "block", "layer", "hidden"), "layer_output"),
)  # words in the names of its components -> our places


def by_layer(source: Source, arch: Arch, name: str) -> dict[int, torch.Tensor]:
    """Layer -> rows [k, C] float32, k = 1 for a direction.

    Layouts: one tensor a layer whose name ends in the layer's number, 0-based (`direction.14`, as EasySteer and repeng name
    them in GGUF; `layers.14`), [C] or [k, C]; a single tensor for all layers, [depth, C] or [depth, k, C]; the folder of a
    repsteer artifact (direction or subspace), whose manifest says the layer. Raises VlmFixError for anything else, and for
    layers or sizes that the model does not have.
    """
    if isinstance(source, str) and Path(source).expanduser().is_dir():
        found = _repsteer(Path(source).expanduser(), name)
    else:
        found = _numbered(read_tensors(source, name), arch.depth, name, str(source))
    made = {}
    for layer, rows in found.items():
        rows = rows.float().reshape(-1, rows.shape[-1])
        if layer >= arch.depth or rows.shape[-1] != arch.hidden:
            raise VlmFixError(
                f"{name}: {source} holds vectors of {rows.shape[-1]} channels for layer {layer}; this model has {arch.hidden} "
                f"channels and layers 0 to {arch.depth - 1}: take a file that was made for it."
            )
        made[layer] = rows
    return made


def _numbered(tensors: Mapping[str, torch.Tensor], depth: int, name: str, source: str) -> dict[int, torch.Tensor]:
    if len(tensors) == 1 and not re.search(r"\d$", next(iter(tensors))):
        (only,) = tensors.values()
        if only.dim() in (2, 3) and only.shape[0] == depth:
            return dict(enumerate(only))
    numbers = {key: re.search(r"(\d+)$", key) for key in tensors}
    bad = [key for key, number in numbers.items() if number is None or tensors[key].dim() not in (1, 2)]
    if bad or not tensors:
        raise VlmFixError(
            f"{name}: {bad[0] if bad else 'nothing'} in {source} is not understood; name one vector or matrix of rows for each "
            f"layer by its number, as in direction.14, or give one tensor [{depth}, channels]."
        )
    return {int(number[1]): tensors[key] for key, number in numbers.items() if number}


def _repsteer(folder: Path, name: str) -> dict[int, torch.Tensor]:
    tensors, (key, site) = folder / REPSTEER[1], _manifest(folder)
    layer = site.get("layer")
    if site.get("stream", "language") != "language" or not isinstance(layer, int) or layer < 0:
        raise VlmFixError(f"{name}: the artifact in {folder} is not of one layer of the language model.")
    found = read_tensors(str(tensors), name)
    if key not in found:
        raise VlmFixError(f"{name}: {tensors} has no tensor {key!r}, which its manifest promises.")
    return {layer: found[key]}


def _manifest(folder: Path) -> tuple[str, dict[str, Any]]:
    """The name of an artifact's tensor, and where the artifact belongs."""
    try:
        about = json.loads((folder / REPSTEER[0]).read_text(encoding="utf-8"))
        site = about.get("site") or {}
        key = {"direction": "direction", "subspace": "basis"}[about["artifact_type"]]
        site.get("layer")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise VlmFixError(
            f"{folder} is not a repsteer artifact of a direction or a subspace; give its folder or a safetensors file."
        ) from None
    return key, site


def place_of(source: Source) -> str | None:
    """Where a repsteer artifact's vector belongs: a place of `HiddenEdit`, by its manifest; None for other files.

    Raises VlmFixError for a place that is not known here.
    """
    if not isinstance(source, str) or not Path(source).expanduser().is_dir():
        return None
    _, site = _manifest(Path(source).expanduser())
    component, io = str(site.get("component", "")), site.get("io", "output")
    place = next((place for words, place in COMPONENTS if any(word in component for word in words)), None)
    if place is None or io != "output":
        raise VlmFixError(
            f"{source}: its place, {component!r} ({io}), is not known here; save the tensor as a safetensors file and name the "
            "place with place=."
        )
    return place
