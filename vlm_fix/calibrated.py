"""Calibration files: what was found for one method on one model, and how it fills a method's parameters."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_fix.arch import Arch
from vlm_fix.errors import VlmFixError
from vlm_fix.method import Method
from vlm_fix.tensors import Tensors
from vlm_fix.whole import whole_file

TENSORS = "tensors"  # in a file, marks a value that is a safetensors file beside it


@dataclass(frozen=True)
class Calibration:
    """One method's parameters for one model, and where they come from."""

    method: str
    found: dict[str, Any]
    model: dict[str, Any]  # name, type, depth, hidden, heads, weights (revision or sha256), ...
    command: str = ""
    seed: int = 0
    data: dict[str, Any] = field(default_factory=dict)  # source, questions per half, sha256
    score: dict[str, Any] = field(default_factory=dict)  # held-out questions, before and after
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""

    def write(self, path: str | Path) -> None:
        """As JSON, tensors in safetensors files beside it; a reader never sees half a file."""
        path = Path(path)
        content = dataclasses.asdict(self)
        for name, value in self.found.items():
            if isinstance(value, Tensors):
                beside = path.with_name(f"{path.stem}.{name}.safetensors")
                value.write(beside)
                content["found"][name] = {TENSORS: beside.name}
        with whole_file(path) as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Calibration:
        """Raises VlmFixError for a file that is missing or was not written by `vlm-fix calibrate`."""
        remedy = "make it with `vlm-fix calibrate METHOD --out FILE`."
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError:
            raise VlmFixError(f"calibration file {path} cannot be read; {remedy}") from None
        except (ValueError, RecursionError):
            raise VlmFixError(f"{path} is not a calibration file (no JSON); {remedy}") from None
        known = {f.name: f.type for f in dataclasses.fields(cls)}
        if (
            not isinstance(content, dict)
            or not {"method", "found", "model"} <= set(content) <= set(known)
            or not isinstance(content["method"], str)
            or not all(isinstance(content.get(k, {}), dict) for k, t in known.items() if str(t).startswith("dict"))
            or not all(isinstance(v.get(TENSORS, ""), str) for v in content["found"].values() if isinstance(v, dict))
        ):
            raise VlmFixError(f"{path} is not a calibration file (it needs method, found and model); {remedy}")
        for name, value in content["found"].items():
            if isinstance(value, dict) and TENSORS in value:
                if Path(value[TENSORS]).name != value[TENSORS]:
                    raise VlmFixError(f"{path} names {value[TENSORS]!r}, which is not a file beside it; {remedy}")
                content["found"][name] = str(Path(path).parent / value[TENSORS])
        return cls(**content)

    def fill(self, method: Method) -> Method:
        """`method` with the fields that it was not given, or given as None, taken from here."""
        unknown = sorted(set(self.found) - {f.name for f in dataclasses.fields(method)})
        if unknown:
            raise VlmFixError(
                f"the calibration of {self.method} holds {', '.join(unknown)}, which {self.method} does not take; "
                f"run `vlm-fix calibrate {self.method}` again."
            )
        return method.but(**self.open(method))

    def open(self, method: Method) -> dict[str, Any]:
        """What was found for fields that `method` leaves open."""
        return {k: v for k, v in self.found.items() if k not in method.given or getattr(method, k) is None}

    def check(self, arch: Arch) -> None:
        """VlmFixError if this was found on a model of another kind or size."""
        mine = sizes(arch)
        for key, value in mine.items():
            if self.model.get(key) != value:
                raise VlmFixError(
                    f"the calibration of {self.method} was made on {self.model.get('name', 'a model')} with "
                    f"{key} {self.model.get(key)}, but this model has {key} {value}; run `vlm-fix calibrate {self.method}` "
                    "on this model."
                )

    def compare(self, model: Any) -> None:
        """Warn if this was found on other weights than the model's, as far as both are known."""
        theirs, mine = str(self.model.get("weights", "")), weights_id(model)
        kind = mine.partition(":")[0]
        if theirs != mine and theirs.startswith(kind) and "revision:unknown" not in (theirs, mine):
            warnings.warn(
                f"the calibration of {self.method} was made on other weights ({self.model.get('name', 'a model')}, "
                f"{theirs[:20]}) than this model's ({mine[:20]}): run `vlm-fix calibrate {self.method}` on this model.",
                stacklevel=4,
            )


def weights_id(model: Any) -> str:
    """The hub revision of a model, or for one from a folder the sha256 over its weight files, which are read once."""
    folder = str(getattr(model, "name_or_path", ""))
    if not folder or not Path(folder).is_dir():
        return f"revision:{getattr(model.config, '_commit_hash', None) or 'unknown'}"
    files = sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")])
    return _hashed(tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@functools.cache
def _hashed(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        with open(path, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def sizes(arch: Arch) -> dict[str, Any]:
    """What a calibration and a model must have in common."""
    return {"type": arch.family.name, "depth": arch.depth, "hidden": arch.hidden, "heads": arch.heads}


Files = str | Path | Calibration | Sequence[str | Path | Calibration] | None


def read_all(files: Files) -> list[Calibration]:
    """`Files` -> calibrations, at most one a method."""
    items = [files] if isinstance(files, str | Path | Calibration) else files or ()
    found = [item if isinstance(item, Calibration) else Calibration.read(item) for item in items]
    for c in found:
        if sum(c.method == other.method for other in found) > 1:
            raise VlmFixError(f"there are two calibration files of {c.method}; give one.")
    return found


def check_named(files: Sequence[Calibration], names: Sequence[str]) -> None:
    """Raise VlmFixError for a file of a method that is not among the names."""
    own = [name for name in names if name != "baseline"]
    for c in files:
        if c.method not in own:
            why = f"fits none of {', '.join(own)}" if own else "has no effect: no method is named"
            raise VlmFixError(f"the calibration of {c.method} {why}; leave the file out or add {c.method}.")


def choose(files: Files, model: Any, methods: Sequence[Method]) -> list[Calibration]:
    """The calibrations of `methods`: those given, else those in the folder calibration/ of the model's checkpoint.

    Warns of one that was found on other weights, or that is given but has nothing to fill. Raises VlmFixError for a file of
    a method that is not among them.
    """
    found = find(files, str(getattr(model, "name_or_path", "")), methods)
    for c in found:
        c.compare(model)
    return found


def find(files: Files, checkpoint: str, methods: Sequence[Method]) -> list[Calibration]:
    """What `choose` returns for a model from the folder `checkpoint`, without a look at its weights."""
    found, names = read_all(files), {m.name: m for m in methods}
    check_named(found, [m.name for m in methods])
    for c in found:
        if c.found and not c.open(names[c.method]):
            warnings.warn(
                f"the calibration of {c.method} fills nothing: all of it ({', '.join(c.found)}) is given.",
                stacklevel=5,
            )
    for name in sorted(names.keys() - {c.method for c in found}) if checkpoint else ():
        file = Path(checkpoint) / "calibration" / f"{name}.json"
        found += [Calibration.read(file)] if file.is_file() else []
    return found


def apply(calibrations: Sequence[Calibration], methods: Sequence[Method], arch: Arch) -> list[Method]:
    """The methods with what was found for them; VlmFixError for what was found on another kind of model."""
    for c in calibrations:
        c.check(arch)
    by_name = {c.method: c for c in calibrations}
    return [by_name[m.name].fill(m) if m.name in by_name else m for m in methods]
