"""Recommended methods in a file: `vlm-fix recommend` writes it; `wrap(model, "vlm-fix.yaml")`, `--method @vlm-fix.yaml` read it.

    stack:                                  what to wrap the model with; empty where the model itself was best
    - method: vhr
      parameters: {alpha: 1.5}              those that are not the default, a calibration's among them
    model: {name: ..., type: llava, depth: 12, hidden: 256, heads: 4, weights: "sha256:..."}
    verdict, figures, objective, data, versions, seed, date, command    what it rests on

The parameters are complete, so that no calibration file is needed beside it, but for tensors (nullu, vti), which are safetensors
files in the same folder.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_fix.arch import Arch
from vlm_fix.calibrated import sizes, weights_id
from vlm_fix.errors import VlmFixError
from vlm_fix.families import arch_of
from vlm_fix.method import Method
from vlm_fix.registry import Spec, file_of, read_file, read_stack
from vlm_fix.tensors import Tensors
from vlm_fix.whole import whole_file

UNKNOWN = "revision:unknown"


@dataclass(frozen=True)
class Preset:
    """A stack of methods for one model, and what it rests on."""

    methods: tuple[Method, ...]
    model: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)  # verdict, figures, objective, data, versions, command, ...

    @classmethod
    def read(cls, path: str | Path) -> Preset:
        """Raises VlmFixError for a file that is missing or was not written by `vlm-fix recommend`."""
        content = read_file(path)
        model = content.get("model")
        if not isinstance(model, dict):
            raise VlmFixError(f"{path} does not say which model it is for: make it with `vlm-fix recommend`.")
        about = {name: value for name, value in content.items() if name not in ("stack", "model", "method")}
        return cls(tuple(read_stack(path)), model, about)

    def write(self, path: str | Path) -> None:
        """As YAML, tensors in safetensors files beside it; a reader never sees half a file."""
        import yaml

        path = Path(path)
        stack = [{"method": m.name, "parameters": _parameters(m, path)} for m in self.methods]
        content = {
            "method": "+".join(m.spec() for m in self.methods) or "baseline",
            "stack": stack,
            "model": self.model,
        }
        text = yaml.safe_dump({**content, **self.about}, sort_keys=False, allow_unicode=True, width=120)
        with whole_file(path) as part:
            part.write_text(text, encoding="utf-8")

    def check(self, model: Any, path: str | Path) -> None:
        """VlmFixError, with the reason, if this was found on another model than this one; a warning where that cannot be told."""
        name, arch = self.model.get("name", "a model"), arch_of(model)
        remedy = f"run `vlm-fix recommend` on this model, or name its method yourself: {self.spec}."
        for key, value in sizes(arch).items():
            if self.model.get(key) != value:
                raise VlmFixError(
                    f"{path} is for {name} with {key} {self.model.get(key)}, but this model has {key} {value}; {remedy}"
                )
        theirs, mine = str(self.model.get("weights", UNKNOWN)), weights_id(model)
        if UNKNOWN in (theirs, mine) or theirs.partition(":")[0] != mine.partition(":")[0]:
            warnings.warn(
                f"{path} is for {name} ({theirs[:23]}); whether this model ({mine[:23]}) has its weights cannot be told.",
                stacklevel=3,
            )
        elif theirs != mine:
            raise VlmFixError(
                f"{path} is for other weights ({name}, {theirs[:23]}) than this model's ({mine[:23]}); {remedy}"
            )

    @property
    def spec(self) -> str:
        """The stack as `--method` takes it."""
        return "+".join(method.spec() for method in self.methods) or "baseline"


def model_of(identity: dict[str, Any], arch: Arch) -> dict[str, Any]:
    """What a file says of its model: what it is called, and what `Preset.check` compares."""
    return {**identity, **sizes(arch)}


def check(spec: Spec, model: Any) -> None:
    """Raise VlmFixError for a file among `spec` that is for another model."""
    items: Sequence[Any] = spec if isinstance(spec, list | tuple) else [spec]
    for item in items:
        if isinstance(item, str) and (path := file_of(item)):
            Preset.read(path).check(model, path)


def _parameters(method: Method, path: Path) -> dict[str, Any]:
    """The parameters that are not the default, as YAML holds them."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(method):
        value = getattr(method, f.name)
        if value == f.default and f.name not in method.given:
            continue
        if isinstance(value, Tensors):
            beside = path.with_name(f"{path.stem}.{method.name}.{f.name}.safetensors")
            value.write(beside)
            value = beside.name
        elif f.name == "file" and isinstance(value, str):
            value = os.path.relpath(value, path.parent)
        found[f.name] = list(value) if isinstance(value, tuple) else value
    return found
