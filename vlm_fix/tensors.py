"""Tensors that a method's parameters name: a safetensors file, or the same before it is written."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlm_fix.errors import VlmFixError
from vlm_fix.whole import whole_file


class Tensors:
    """Named tensors in memory, as `calibrate` finds them; a calibration file keeps them in a safetensors file beside it."""

    def __init__(self, named: Mapping[str, torch.Tensor]):
        self.named = {name: t.detach().float().cpu().contiguous() for name, t in named.items()}
        self._there: dict[tuple[str, torch.device], torch.Tensor] = {}

    def on(self, name: str, device: torch.device) -> torch.Tensor:
        """A tensor on a device, moved there once."""
        if (name, device) not in self._there:
            self._there[name, device] = self.named[name].to(device)
        return self._there[name, device]

    def __deepcopy__(self, memo: Any) -> Tensors:
        return self  # nothing changes it

    def __reduce__(self) -> Any:
        return Tensors, (self.named,)

    def __repr__(self) -> str:
        return f"<{len(self.named)} tensors>"

    def write(self, path: Path) -> None:
        """As safetensors; a reader never sees half a file."""
        with whole_file(path) as part:
            save_file(self.named, part)


def read_tensors(source: str | Tensors, name: str) -> Mapping[str, torch.Tensor]:
    """Name -> tensor on the CPU, of finite numbers; `name` is the method's, for the sentence of a VlmFixError."""
    named = source.named if isinstance(source, Tensors) else _of_file(source, name)
    for key, t in named.items():
        if t.is_complex() or not bool(t.float().isfinite().all()):
            raise VlmFixError(f"{name}: {key} in {source} holds NaN, infinite or complex numbers; make it again.")
    return named


def _of_file(source: str, name: str) -> Mapping[str, torch.Tensor]:
    path = Path(source).expanduser()
    if not path.is_file():
        raise VlmFixError(f"{name}: there is no file {source}; name a safetensors file.")
    try:
        about = path.stat()
        return _read(str(path), (about.st_ino, about.st_mtime_ns))
    except (SafetensorError, OSError):
        raise VlmFixError(
            f"{name}: {source} is not a safetensors file; other formats can run code when they are read: save the tensors "
            "again with safetensors."
        ) from None


@functools.lru_cache(maxsize=32)
def _read(path: str, version: tuple[int, int]) -> Mapping[str, torch.Tensor]:
    return load_file(path)


def one_stream(x: torch.Tensor, name: str) -> torch.Tensor:
    """`x`, hidden states [B, q, C] that the method `name` reads between layers; VlmFixError where there are several streams."""
    if x.dim() == 3:
        return x
    raise VlmFixError(
        f"{name} reads hidden states between layers, and the layers of this model carry {len(x)} streams of them (AltUp), for "
        "which it is not defined."
    )
