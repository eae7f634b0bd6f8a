"""Directions and subspaces made elsewhere, read from safetensors by their published layouts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from vlm_fix import Arch, VlmFixError
from vlm_fix.tensors import Tensors, read_tensors

Source = str | Tensors
REPSTEER = ("manifest.json", "tensors.safetensors")
COMPONENTS = {
    "resid_pre": "layer_output",  # of the layer before
    "attn_out": "attention_output",
    "mlp_out": "mlp_output",
    "resid_post": "layer_output",
}  # its names -> our places


def by_layer(source: Source, arch: Arch, name: str) -> dict[int, torch.Tensor]:
    """Layer -> rows [k, C] float32, k = 1 for a direction.

    Layouts: one tensor a layer whose name ends in the layer's number, 0-based (`direction.14`, as EasySteer and repeng name
    them in GGUF; `layers.14`), [C] or [k, C]; a single tensor for all layers, [depth, C] or [depth, k, C]; the folder of a
    repsteer artifact (direction or subspace), whose manifest says the layer. Raises VlmFixError for anything else, for
    layers or sizes that the model does not have, and for two tensors of one layer.
    """
    if isinstance(source, str) and Path(source).expanduser().is_dir():
        found = _repsteer(Path(source).expanduser(), name)
    else:
        found = _numbered(read_tensors(source, name), arch.depth, name, str(source))
    made = {}
    for layer, rows in found.items():
        if not rows.numel():
            raise VlmFixError(f"{name}: {source} holds an empty tensor for layer {layer}; leave it out.")
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
    found: dict[int, str] = {}
    for key, number in numbers.items():
        layer = int(number[1]) if number else 0
        if layer in found:
            raise VlmFixError(
                f"{name}: {source} holds {found[layer]} and {key}, both for layer {layer}; keep one tensor for each layer, "
                "and name its place with place=."
            )
        found[layer] = key
    return {layer: tensors[key] for layer, key in found.items()}


def of_part(source: Source, name: str, part: str, depth: int, shapes: Sequence[str]) -> dict[str, torch.Tensor]:
    """`part`.LAYER -> directions of length 1 [..., C] float32, without those that are zero; shapes, as in "N, C".

    Raises VlmFixError for layers and shapes that the part of the model does not have, and where all directions are zero.
    """
    own = {key: t for key, t in read_tensors(source, name).items() if key.startswith(f"{part}.")}
    if not own:
        raise VlmFixError(f"{name}: {source} holds no {part}.LAYER; set alpha_{part}=0 to go without.")
    if not own.keys() <= {f"{part}.{i}" for i in range(depth)}:
        raise VlmFixError(f"{name}: {source} is of another model: this one has {depth} {part} layers.")
    for key, t in own.items():
        if not t.numel() or t.dim() not in [shape.count(",") + 1 for shape in shapes]:
            wanted = " or ".join(f"[{shape}]" for shape in shapes)
            raise VlmFixError(f"{name}: {key} in {source} has the shape {list(t.shape)}; it must be {wanted}.")
    if not any(bool(t.any()) for t in own.values()):
        raise VlmFixError(f"{name}: every {part}.LAYER in {source} is zeros; set alpha_{part}=0 to go without.")
    return {key: normalize(t.float(), dim=-1) for key, t in own.items() if bool(t.any())}


def _repsteer(folder: Path, name: str) -> dict[int, torch.Tensor]:
    tensors, (key, layer, _) = folder / REPSTEER[1], _site(folder)
    found = read_tensors(str(tensors), name)
    if key not in found:
        raise VlmFixError(f"{name}: {tensors} has no tensor {key!r}, which its manifest promises.")
    return {layer: found[key]}


def _site(folder: Path) -> tuple[str, int, str]:
    """The name of an artifact's tensor, and where it belongs: layer and place of `HiddenEdit`.

    repsteer's resid_pre is the input of a layer, which is the output of the one before. Raises VlmFixError for what is no
    artifact, and for places that are none here: embeddings, resid_mid (between attention and MLP), single heads.
    """
    try:
        about = json.loads((folder / REPSTEER[0]).read_text(encoding="utf-8"))
        site: dict[str, Any] = about.get("site") or {}
        key = {"direction": "direction", "subspace": "basis"}[about["artifact_type"]]
        layer, unit, stream = site.get("layer"), site.get("unit"), site.get("stream", "language")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise VlmFixError(
            f"{folder} is not a repsteer artifact of a direction or a subspace; give its folder or a safetensors file."
        ) from None
    component, io = site.get("component"), site.get("io", "output")
    if stream != "language" or type(layer) is not int or layer < 0:
        raise VlmFixError(f"the artifact in {folder} is not of one layer of the language model.")
    if unit is not None:
        raise VlmFixError(
            f"the artifact in {folder} is of a part of {component} alone, unit {unit!r}, which is no place here."
        )
    place = COMPONENTS.get(component) if isinstance(component, str) and io == "output" else None
    if place is None or (component == "resid_pre" and layer == 0):
        where = {"resid_mid": ", between attention and MLP", "resid_pre": ", the embeddings"}.get(str(component), "")
        raise VlmFixError(
            f"{folder}: its place, {component!r} ({io}) of layer {layer}{where}, is none of those that are known here "
            f"({', '.join(COMPONENTS)}); to use the tensor elsewhere, save it as a safetensors file."
        )
    return key, layer - (component == "resid_pre"), place


def place_of(source: Source) -> str | None:
    """Where a repsteer artifact's tensor belongs: a place of `HiddenEdit`, by its manifest; None for other files.

    Raises VlmFixError for a place that is not known here.
    """
    if not isinstance(source, str) or not Path(source).expanduser().is_dir():
        return None
    return _site(Path(source).expanduser())[2]
