"""One case a method: what the contracts in `tests/contracts` hold every registered method to.

A new method is one entry here; its float64 reference is a row of `ROWS` in `matrix.py`, or a test in its own folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.support.matrix import CUT, IRI
from tests.support.run import VAR_TINY

MODES = ("cache_implementation", "prefill_chunk_size", "prompt_lookup_num_tokens")


@dataclass(frozen=True)
class Case:
    """`specs` change what the tiny models answer, `neutral` ones change no bit of it."""

    specs: tuple[str, ...]
    neutral: tuple[str, ...]
    refuses: Mapping[str, str] = field(default_factory=dict)  # an option of generate -> words of the sentence
    effect: bool = True  # False: it changes nothing at all
    scores: bool = True  # False: a decoding loop of its own, which returns tokens alone

    @property
    def method(self) -> str:
        return self.specs[0].partition(":")[0]


def edit(*specs: str, neutral: tuple[str, ...], **more) -> Case:
    """A method that works in every mode of `generate`, unless `refuses` says otherwise."""
    return Case(specs, neutral, **more)


def pruner(*specs: str, neutral: tuple[str, ...] = (), **refuses: str) -> Case:
    """Without `neutral`: the first spec with a budget that covers every image token."""
    name, join = specs[0].partition(":")[0], "," if ":" in specs[0] else ":"
    neutral = neutral or tuple(f"{specs[0]}{join}keep={keep}" for keep in ("1.0", "1000"))
    return Case(specs, neutral, dict.fromkeys(MODES, f"{name} does not work with") | refuses)


def loop(*specs: str, neutral: tuple[str, ...], **refuses: str) -> Case:
    """A decoding loop of its own names the options that it refuses."""
    return Case(specs, neutral, {o: o for o in (*MODES, "num_beams", "num_return_sequences")} | refuses, scores=False)


CHUNKS = {"prefill_chunk_size": "whole prompt in one forward"}
HEADS = "|".join(f"{layer}.{head}" for layer, head in CUT)
MARKS, THINGS = ("|".join(map(str, range(*ids))) for ids in ((3, 40), (40, 60)))
CROP = "carve:tokens=11|12|13,black=-1.8|-1.75|-1.5,steps=3"
CASES = {
    case.method: case
    for case in (
        edit("baseline", neutral=("baseline",), effect=False),
        # attention, heads, hidden states
        edit("act:threshold=0.06,beta=0.1,layers=0-", neutral=("act:beta=1", "act:threshold=1"), refuses=CHUNKS),
        edit(f"ad_hh:threshold=0.15,head_list={HEADS}", neutral=("ad_hh:threshold=1.5,head_list=0.0",)),
        edit("avar:visual=1.8,system=0.4", neutral=("avar:visual=1,system=0",)),
        edit("cca", neutral=("cca:positions=false,mask=false",), refuses=CHUNKS),
        edit("gift:alpha=3,source_layer=1,layers=2-3", neutral=("gift:alpha=0",)),
        edit("hgai:alpha=1,layers=0-", neutral=("hgai:alpha=0",)),
        edit("locore:beta=2,window=3", neutral=("locore:beta=0",)),
        edit("pai:alpha=0.5", "pai:alpha=0.5,gamma=1.3", neutral=("pai:alpha=0",)),
        edit("paint:alpha=1,beta=0.7,layers=0-", neutral=("paint:alpha=0,beta=0",)),
        edit("tame:gamma=0.4", neutral=("tame:gamma=0",), refuses=CHUNKS),
        edit("vaf:enhance=2,suppress=0.5,layers=0-", neutral=("vaf:enhance=1,suppress=1",)),
        edit(f"var:{VAR_TINY}", neutral=("var:p=0",)),
        edit("zerotuning:rate=0.1", neutral=("zerotuning:rate=1",)),
        edit("head_pursuit:head_list=1.0|3.2|3.3,factor=-1", neutral=("head_pursuit:head_list=1.2,factor=1",)),
        edit("random_heads:seed=1,layers=1-3", neutral=("random_heads:alpha=1",)),
        edit("spin:keep=0.8,epsilon=0.1,layers=0-", neutral=("spin:keep=1", "spin:epsilon=1")),
        edit("vhr", neutral=("vhr:alpha=1",)),
        edit(IRI, neutral=(f"{IRI},lambda_a=0,lambda_m=0".replace("lambda_a=4,lambda_m=4,", ""), "iri:lambda_a=0,lambda_m=0")),
        # contrasts
        edit("causalmm:beta=0.01", neutral=("causalmm:gamma=0", "causalmm:vision=none,language=none")),
        edit("decore:head_list=1.0|1.3|2.2|3.1", neutral=("decore:alpha=0,head_list=1.0",)),
        edit("iava:tokens=21|22|23,beta=0.01", neutral=("iava:alpha=0",)),
        edit("icd:tokens=11|12|13,beta=0.01", neutral=("icd:alpha=0",)),
        edit(f"layercake:punctuation={MARKS},concepts={THINGS},beta=0.01", neutral=("layercake:alpha=0",)),
        edit("m3id:decay=0.3,beta=0.01", neutral=("m3id:decay=0",)),
        edit("sid:beta=0.01", neutral=("sid:alpha=0",)),
        edit("vcd:beta=0.01", neutral=("vcd:alpha=0",)),
        edit("yes_bias:tokens=11|12|13", neutral=("yes_bias:alpha=0",)),
        # the distribution of the next token
        edit("apc_only:beta=0.3", neutral=("apc_only:beta=0",)),
        edit("dagcd:alpha=6", neutral=("dagcd:alpha=0",)),
        edit("deco:layers=1-3", neutral=("deco:alpha=0",)),
        edit("dola:layers=0|1|2|3", neutral=("dola:alpha=0",)),
        edit("gaussian_logits:sigma=2,seed=3", neutral=("gaussian_logits:sigma=0",)),
        edit("yes_threshold:yes=3|69|32,no=20|52,mass=0.02,margin=0.9", neutral=("yes_threshold:margin=0",)),
        # procedures
        edit(CROP, f"{CROP},images=both", neutral=(f"{CROP},top=1.0", f"{CROP},top=1.0,images=both")),
        loop("opera:threshold=1,warmup=2,beams=3,candidates=3", neutral=("opera:weight=0",), do_sample="do_sample",
             streamer="streamer"),
        loop("sgrs:layers=1-3,alpha=1", neutral=("sgrs:top_k=1",)),
        # pruning before the language model, in its layers, in its cache
        pruner("divprune"),
        pruner("downsample_image:keep=5", neutral=("downsample_image:keep=1.0", "downsample_image:keep=1000")),
        pruner("hiprune:keep=4", neutral=("hiprune:keep=1.0", "hiprune:keep=1000")),
        pruner("random_tokens"),
        pruner("uniform_grid"),
        pruner("visionzip:contextual=0.4"),
        pruner("vscan:windows=2", "vscan:windows=2,llm_keep=1",
               neutral=("vscan:windows=2,llm_keep=1,keep=1.0", "vscan:windows=2,llm_keep=1,keep=1000")),
        pruner("zoo_prune:directions=3,seed=4"),
        pruner("fastv:keep=5", neutral=("fastv:keep=1.0", "fastv:keep=99")),
        pruner("ptp:keep=4", neutral=("ptp:keep=99",)),
        pruner("pyramid_drop", neutral=("pyramid_drop:keep=99|99|99",)),
        pruner("sparsevlm", neutral=("sparsevlm:keep=1|99|1",)),
        pruner("a_vl:core=0.2,text_start=3,text_every=2", num_beams="a_vl does not work with beams",
               neutral=("a_vl:keep=99,core=1,text_keep=1", "a_vl:keep=1,every=1,text_start=99")),
        pruner("expected_attention:keep=3", neutral=("expected_attention:keep=99",)),
        pruner("knorm:keep=3", neutral=("knorm:keep=99", "knorm:keep=1.0")),
    )
}  # fmt: skip
SPECS = {spec: case for case in CASES.values() for spec in case.specs}
NEUTRAL = [spec for case in CASES.values() for spec in case.neutral]


def named(spec: str) -> str:
    """A test's id: the spec, short enough to read."""
    return spec if len(spec) < 80 else f"{spec[:77]}..."
