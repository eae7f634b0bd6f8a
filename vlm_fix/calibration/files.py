"""What papers tune by hand for one model, found from labelled samples and kept in a small JSON that `wrap` reads.

A method finds its own parameters in `Method.calibrate`; `vlm-fix calibrate` makes the samples, searches strengths and
writes the file. wrap(model, "iri", calibration="iri.json") fills the fields that are not given from it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlm_fix.arch import Arch
from vlm_fix.errors import VlmFixError
from vlm_fix.families import family_of, prompt_positions
from vlm_fix.families.compat import cache_of, with_cache
from vlm_fix.method import Method

Key = TypeVar("Key")


@dataclass(frozen=True)
class Sample:
    """One labelled question: the processor's output for one prompt (batch 1, ends where the answer begins).

    target is the token id of the right answer's first token, other that of the wrong one. vocabulary: word -> id of its
    first token, for the concept words that a method asks for (all samples share one).
    """

    inputs: dict[str, Tensor]
    target: int
    other: int
    vocabulary: dict[str, int] = field(default_factory=dict, repr=False)


def collate(samples: Sequence[Sample], pad_id: int = 0) -> dict[str, Tensor]:
    """The samples' inputs as one left-padded batch: ids, masks [B, L]; images one after the other."""
    batch: dict[str, Tensor] = {}
    width = max(s.inputs["input_ids"].shape[1] for s in samples)
    for key in samples[0].inputs:
        rows = [s.inputs[key] for s in samples]
        if _along_prompt(samples[0], key):
            fill = pad_id if key == "input_ids" else 0
            rows = [pad(r, (width - r.shape[1], 0), value=fill) for r in rows]
        batch[key] = torch.cat(rows)
    return batch


def _along_prompt(sample: Sample, key: str) -> bool:
    return sample.inputs[key].shape == sample.inputs["input_ids"].shape


def batches(samples: Sequence[Sample], size: int, pad_id: int = 0) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """(indices of the samples, their collated inputs) in batches of similar length.

    Images of other sizes (more tiles, for one) cannot be in one tensor and come in batches of their own.
    """

    def shapes(s: Sample) -> tuple[Any, ...]:
        return tuple((k, tuple(v.shape[1:])) for k, v in sorted(s.inputs.items()) if not _along_prompt(s, k))

    def order(i: int) -> tuple[Any, ...]:
        return shapes(samples[i]), samples[i].inputs["input_ids"].shape[1]

    for _, group in itertools.groupby(sorted(range(len(samples)), key=order), key=lambda i: shapes(samples[i])):
        same = list(group)
        for start in range(0, len(same), size):
            part = same[start : start + size]
            yield part, collate([samples[i] for i in part], pad_id)


@torch.no_grad()
def answer_scores(model: Any, samples: Sequence[Sample], batch_size: int = 16) -> Tensor:
    """Scores [N, 2], on the CPU, of each sample's (target, other) as first answer token.

    They are what greedy `generate` compares, so contrasts and logit edits of a wrapped model are in them; of an unwrapped
    model they are raw logits. Calls `generate`: batches of `batch_size`, one new token.
    """
    result = torch.empty(len(samples), 2)
    pad_id = model.generation_config.pad_token_id or 0
    for part, inputs in batches(samples, batch_size, pad_id):
        out = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, num_beams=1, return_dict_in_generate=True, output_scores=True
        )
        for row, i in enumerate(part):
            result[i] = out.scores[0][row, [samples[i].target, samples[i].other]].float().cpu()
    return result


def accuracy(scores: Tensor) -> float:
    """Share of the questions whose right answer scores higher; scores [N, 2] of `answer_scores`."""
    return float((scores[:, 0] > scores[:, 1]).float().mean())


def sureness(scores: Tensor) -> float:
    """Mean log-probability of the right one of the two answers; a cut-off answer is bounded at -30."""
    margin = (scores[:, 0] - scores[:, 1]).nan_to_num(nan=-30.0).clamp(-30, 30)
    return float(torch.nn.functional.logsigmoid(margin).mean())


def best_value(
    model: Any,
    method: Method,
    name: str,
    values: Sequence[Any],
    samples: Sequence[Sample],
    progress: Callable[[str, float], None],
) -> Any:
    """The value of the field `name` with most right answers, then the surest; None if the model alone has them.

    Cost: one pass over the samples for each value, and one.
    """
    from vlm_fix.wrapping import wrapped

    scores = {}
    for value in (None, *values):
        with wrapped(model, "baseline" if value is None else dataclasses.replace(method, **{name: value})):
            found = answer_scores(model, samples)
        scores[value] = (accuracy(found), sureness(found))
        progress(name, len(scores) / (len(values) + 1))
    return max(scores, key=lambda value: scores[value])


class LastRow:
    """A batch of prompts whose last row can be run again and again under the caller's hooks, at a decode step's cost.

    What only the last row computes can be changed there exactly: everything before it is in the cache (a prompt that is
    not causal is run whole, so hooks must write to row -1 only). `inputs` is what `collate` makes.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor]):
        self.model, self.inputs, family = model, inputs, family_of(model)
        self.cache = None
        if family.causal:
            self.positions, _ = prompt_positions(model, family, inputs)
            size = inputs["input_ids"].shape
            before = {k: v[:, :-1] if v.shape == size else v for k, v in inputs.items()}
            with torch.no_grad():
                out = model(**before, position_ids=self.positions[..., :-1], use_cache=True)
            self.cache = cache_of(out)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """[B, V] float32 logits of the answer's first token."""
        if self.cache is None:
            return self.model(**self.inputs).logits[:, -1].float()
        step = {
            "input_ids": self.inputs["input_ids"][:, -1:],
            "attention_mask": self.inputs["attention_mask"],
            "position_ids": self.positions[..., -1:],
        }
        # a copy: sliding-window caches cannot be cropped
        return self.model(**with_cache(step, copy.deepcopy(self.cache))).logits[:, -1].float()

    def outputs(self, modules: Mapping[Key, torch.nn.Module]) -> tuple[Tensor, dict[Key, Tensor]]:
        """`logits`, and what each of `modules` puts out in the last row, [B, C]."""
        kept: dict[Key, Tensor] = {}

        def keep(key: Key, module: Any, args: Any, output: Any) -> None:
            kept[key] = (output[0] if isinstance(output, tuple) else output)[:, -1].clone()

        with hooked([m.register_forward_hook(functools.partial(keep, key)) for key, m in modules.items()]):
            return self.logits(), kept


@contextlib.contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """Take hooks off again at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def overwrite(module: torch.nn.Module, value: Tensor) -> Any:
    """A hook on `module` that writes `value` [B, C] over the last row of its output."""

    def replace(module: Any, args: Any, output: Any) -> Any:
        x = (output[0] if isinstance(output, tuple) else output).clone()
        x[:, -1] = value
        return (x, *output[1:]) if isinstance(output, tuple) else x

    return module.register_forward_hook(replace)


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
        """As JSON; a reader never sees half a file."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        part.replace(path)

    @classmethod
    def read(cls, path: str | Path) -> Calibration:
        """Raises VlmFixError for a file that is missing or was not written by `vlm-fix calibrate`."""
        remedy = "make it with `vlm-fix calibrate METHOD --out FILE`."
        try:
            content = json.loads(Path(path).read_text())
        except OSError:
            raise VlmFixError(f"calibration file {path} cannot be read; {remedy}") from None
        except ValueError:
            raise VlmFixError(f"{path} is not a calibration file (no JSON); {remedy}") from None
        known = {f.name: f.type for f in dataclasses.fields(cls)}
        if (
            not isinstance(content, dict)
            or not {"method", "found", "model"} <= set(content) <= set(known)
            or not isinstance(content["method"], str)
            or not all(isinstance(content.get(k, {}), dict) for k, t in known.items() if str(t).startswith("dict"))
        ):
            raise VlmFixError(f"{path} is not a calibration file (it needs method, found and model); {remedy}")
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


def choose(files: Files, model: Any, methods: Sequence[Method]) -> list[Calibration]:
    """The calibrations of `methods`: those given, else those in the folder calibration/ of the model's checkpoint.

    Warns of one that was found on other weights, or that is given but has nothing to fill. Raises VlmFixError for a file of
    a method that is not among them.
    """
    found, names = read_all(files), {m.name: m for m in methods}
    for c in found:
        if c.method not in names:
            raise VlmFixError(
                f"the calibration of {c.method} fits none of {', '.join(m.name for m in methods)}; leave the file out or "
                f"add {c.method}."
            )
        if c.found and not c.open(names[c.method]):
            warnings.warn(
                f"the calibration of {c.method} fills nothing: all of it ({', '.join(c.found)}) is given.",
                stacklevel=4,
            )
    checkpoint = str(getattr(model, "name_or_path", ""))
    for name in sorted(names.keys() - {c.method for c in found}) if checkpoint else ():
        file = Path(checkpoint) / "calibration" / f"{name}.json"
        found += [Calibration.read(file)] if file.is_file() else []
    for c in found:
        c.compare(model)
    return found


def apply(calibrations: Sequence[Calibration], methods: Sequence[Method], arch: Arch) -> list[Method]:
    """The methods with what was found for them; VlmFixError for what was found on another kind of model."""
    for c in calibrations:
        c.check(arch)
    by_name = {c.method: c for c in calibrations}
    return [by_name[m.name].fill(m) if m.name in by_name else m for m in methods]
