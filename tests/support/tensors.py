"""Safetensors files for specs of the tiny models: always the same content at the same place."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(tempfile.gettempdir()) / "vlm-fix-tests"
DEPTH, CHANNELS = 4, 64


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def subspace() -> dict[int, torch.Tensor]:
    """{layer: rows [6, C]}"""
    return {i: drawn(100 + i, 6, CHANNELS) for i in range(DEPTH)}


def written(name: str, named: dict[str, torch.Tensor]) -> Path:
    """The file, put in place at once: other processes may read it now."""
    FOLDER.mkdir(exist_ok=True)
    part = FOLDER / f"{name}.{os.getpid()}"
    save_file(named, part)
    part.replace(FOLDER / name)
    return FOLDER / name


def shallow(file: Path, depth: int) -> Path:
    """The file for models of the first `depth` layers alone."""
    kept = {name: x for name, x in load_file(file).items() if int(name.rpartition(".")[2]) < depth}
    return written(f"{file.stem}-{depth}.safetensors", kept)


SUBSPACE = written("subspace.safetensors", {f"layers.{i}": rows for i, rows in subspace().items()})


def vti() -> dict[str, torch.Tensor]:
    """{"text.LAYER": [C], "vision.LAYER": [Cv]}; the tiny models' towers have 4 layers of 32 channels."""
    made = {f"text.{i}": drawn(300 + i, CHANNELS) for i in range(DEPTH)}
    return made | {f"vision.{i}": drawn(400 + i, 32) for i in range(DEPTH)}


DIRECTIONS = written("directions.safetensors", {f"direction.{i}": drawn(200 + i, CHANNELS) for i in range(DEPTH)})
VTI = written("vti.safetensors", vti())


def objects() -> Path:
    """MARINE's file: token ids for every image."""
    part = FOLDER / f"objects.json.{os.getpid()}"
    part.write_text(json.dumps({"*": [11, 12, 13]}))
    part.replace(FOLDER / "objects.json")
    return FOLDER / "objects.json"


OBJECTS = objects()
