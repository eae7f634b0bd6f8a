"""The options of an evaluation, checked: what is asked of which model, and how answers are generated."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers.choices import Labels, Scorer, Variant
from vlm_fix.eval.scorers.pope.score import Kind

GENERATION = {
    "do_sample": "--sample",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "num_beams": "--num-beams",
    "max_new_tokens": "--max-new-tokens",
}
LOADING = {
    "dtype": "--dtype",
    "torch_dtype": "--dtype",
    "device_map": "--device-map",
    "revision": "--revision",
    "trust_remote_code": "--trust-remote-code",
}
"""Arguments of `generate` and of `from_pretrained` that have an option of their own."""
SAMPLING = ("top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
BEAMS = ("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty")
"""Arguments of `generate` that act on sampling alone, and on beam search alone."""


LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, accelerate launch --multi_gpu
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # mpirun, also that of accelerate
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
)


class Place(NamedTuple):
    """Which of how many processes this is, and which of those on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


def launched() -> Place:
    """Return this process's place among those that a launcher started, or that of a process alone."""
    names = next((names for names in LAUNCHERS if names[1] in os.environ), LAUNCHERS[0])
    return Place(*(int(os.environ.get(name, usual)) for name, usual in zip(names, Place(), strict=True)))


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of an evaluation. `methods` has one list of specs per run; the baseline is added.

    What to ask:  `data` and `limit`, a number of images; `seed` draws the data. `build` makes POPE's questions from a COCO
    folder's annotations even if there are official ones; `labels` are those of the official ones; `questions` are POPE
    files about other images. `prompt` None and `max_new_tokens` None mean the benchmark's own. `drop_incomplete` drops a
    cut-off last sentence before CHAIR is scored.
    How to run:  `seeds` are for sampling and for methods that draw at random (default: `seed`); `controls` and
    `equal_compute` add the runs of `plan.runs`; `dtype` "auto" is the checkpoint's on a GPU and float32 on a CPU;
    `device_map` spreads the model over devices; `revision`, `trust_remote_code` and `model_args` are for loading it.
    `gen_kwargs` are further arguments of `generate`. `batch_size` "auto" is the largest that fits. `engine` "vllm" answers
    through vLLM, and `server` (URLs, with commas) through servers that run already; both take none of these.
    """

    benchmark: str = "all"
    model: str = "picto-llava"
    methods: tuple[tuple[str, ...], ...] = ()
    data: str = "picto"
    limit: int | None = None
    batch_size: int | Literal["auto"] = 8
    seed: int = 0
    splits: tuple[Kind, ...] = ("random", "popular", "adversarial")
    scorer: Scorer = "official"
    variant: Variant | None = None
    prompt: str | None = None
    ids: str | None = None
    max_new_tokens: int | None = None
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    num_beams: int = 1
    dtype: str = "auto"
    device: str = "auto"
    calibration: tuple[str, ...] = ()
    device_map: str | None = None
    seeds: tuple[int, ...] = ()
    controls: bool = False
    equal_compute: bool = False
    build: bool = False
    questions: tuple[str, ...] = ()
    drop_incomplete: bool = False
    labels: Labels = "both"
    revision: str | None = None
    trust_remote_code: bool = False
    model_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gen_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    engine: str = "hf"
    server: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_beams", "limit", "max_new_tokens"):
            value = getattr(self, name)
            if value == "auto" and name == "batch_size":
                continue
            if value is not None and value < 1:
                raise VlmFixError(f"--{name.replace('_', '-')} is {value}: give a whole number of at least 1.")
        if self.sample and self.num_beams > 1:
            raise VlmFixError("--sample and --num-beams exclude each other: drop one of them.")
        if not 0 < self.temperature < math.inf or not 0 < self.top_p <= 1:  # nan is neither
            raise VlmFixError("--temperature must be above 0 and --top-p in (0, 1].")
        if len(set(self.seeds)) != len(self.seeds):
            raise VlmFixError(f"--seeds {','.join(map(str, self.seeds))} names a seed twice: give each once.")
        for option, given, own in (
            ("--gen-kwargs", self.gen_kwargs, GENERATION),
            ("--model-args", self.model_args, LOADING),
        ):
            for name in given.keys() & own.keys():
                raise VlmFixError(f"{option} {name}: give {own[name]} instead.")
        served = [name for name in ("revision", "trust_remote_code", "model_args", "gen_kwargs") if getattr(self, name)]
        served += ["batch_size"] if self.batch_size == "auto" else []
        other = "--server" if self.server is not None else "--engine vllm" if self.engine == "vllm" else ""
        if other and served:
            raise VlmFixError(f"--{served[0].replace('_', '-')} has no effect with {other}: leave one of them out.")
        for option, beams in (("--num-beams", self.num_beams > 1), ("--equal-compute", self.equal_compute)):
            if other and beams:
                raise VlmFixError(
                    f"{option} needs beam search, and {other} answers greedily or by sampling: leave one of them out."
                )
        if self.server is not None and not any(url.strip() for url in self.server.split(",")):
            raise VlmFixError(f"--server {self.server!r} names no server: give http://HOST:PORT, or leave it out.")
        for names, acts, remedy in (
            (SAMPLING, self.sample or (self.controls and self.num_beams == 1), "--sample, which goes without beams"),
            (BEAMS, self.num_beams > 1 or self.equal_compute, "--num-beams"),
        ):
            if not acts and (idle := [name for name in self.gen_kwargs if name in names]):
                raise VlmFixError(f"--gen-kwargs {idle[0]} has no effect on this run: add {remedy}, or leave it out.")
        if self.server and self.engine != "hf":
            raise VlmFixError("--server answers in place of --engine: leave one of them out.")
        if self.device_map and launched().size > 1:
            raise VlmFixError(
                "--device-map spreads one model over all devices, and a launcher starts one per process: use one of them."
            )

    def generate_kwargs(self, max_new_tokens: int) -> dict[str, Any]:
        """Return the keyword arguments of `generate`, which override the checkpoint's own generation config."""
        how: dict[str, Any]
        if self.sample:
            how = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        else:
            how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        how |= {"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens or max_new_tokens}
        return {**how, **self.gen_kwargs}
