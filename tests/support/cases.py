"""One case a method: what the contracts in `tests/contracts` hold every registered method to.

A new method is one entry here. `rows` are specs of attention and hidden-state methods with their float64 references, which
`matrix.py` runs in four families; other kinds have tests of their own in the folder of the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.support.references import attention as edits
from tests.support.references import base as ref
from tests.support.references import hidden
from tests.support.run import VAR_TINY
from tests.support.tensors import DIRECTIONS, OBJECTS, SUBSPACE, VTI
from vlm_fix.pruning.kinds import CachePruner, LayerPruner
from vlm_fix.registry import get_method

MODES = ("cache_implementation", "prefill_chunk_size", "prompt_lookup_num_tokens")


@dataclass(frozen=True)
class Case:
    """`specs` change what the tiny models answer, `neutral` ones change no bit of it."""

    specs: tuple[str, ...]
    neutral: tuple[str, ...]
    refuses: Mapping[str, str] = field(default_factory=dict)  # an option of generate -> words of the sentence
    rows: Mapping[str, Callable] = field(default_factory=dict)  # spec -> its float64 loops on a `matrix.Prompt`
    effect: bool = True  # False: it changes nothing at all
    scores: bool = True  # False: a decoding loop of its own, which returns tokens alone

    @property
    def method(self) -> str:
        return self.specs[0].partition(":")[0]


def edit(*specs: str, neutral: tuple[str, ...], **more) -> Case:
    """A method that works in every mode of `generate`, unless `refuses` says otherwise; without `specs`: the first row's."""
    return Case(specs or tuple(more["rows"])[:1], neutral, **more)


def row(cls, layers, **values):
    """The reference `cls` of an edit, on these layers."""
    return lambda p: cls(**p.at, layers=list(layers), **values)


def pruner(*specs: str, neutral: tuple[str, ...] = (), **refuses: str) -> Case:
    """Without `neutral`: the first spec with a budget that covers every image token."""
    name, join = specs[0].partition(":")[0], "," if ":" in specs[0] else ":"
    neutral = neutral or tuple(f"{specs[0]}{join}keep={keep}" for keep in ("1.0", "1000"))
    looks = issubclass(get_method(name), LayerPruner | CachePruner)  # into the cache, which must not be static
    return Case(specs, neutral, dict.fromkeys(MODES[not looks :], f"{name} does not work with") | refuses)


def loop(*specs: str, neutral: tuple[str, ...], **refuses: str) -> Case:
    """A decoding loop of its own names the options that it refuses."""
    return Case(specs, neutral, {o: o for o in (*MODES, "num_beams", "num_return_sequences")} | refuses, scores=False)


ALL = (0, 1, 2, 3)
CUT = ((0, 0), (0, 2), (1, 1), (1, 3), (3, 0), (3, 1), (3, 2))
RATES = {"attention": (0.4, 0.1, 0.3, 0.2), "mlp": (0.1, 0.5, 0.2, 0.3)}
IRI = "iri:rr_attention=0.4|0.1|0.3|0.2,rr_mlp=0.1|0.5|0.2|0.3,sources=2,targets=3,lambda_a=4,lambda_m=4"
CHUNKS = {"prefill_chunk_size": "whole prompt in one forward"}
HEADS = "|".join(f"{layer}.{head}" for layer, head in CUT)
MARKS, THINGS = ("|".join(map(str, range(*ids))) for ids in ((3, 40), (40, 60)))
CROP = "carve:tokens=11|12|13,black=-1.8|-1.75|-1.5,steps=3"
CASES = {
    case.method: case
    for case in (
        edit("baseline", neutral=("baseline",), effect=False),
        # attention, heads, hidden states
        edit(
            neutral=("act:beta=1", "act:threshold=1"),
            refuses=CHUNKS,
            rows={
                "act:threshold=0.06,beta=0.1,layers=0-": row(edits.ACT, ALL, threshold=0.06, beta=0.1),
                "act:threshold=0.04,beta=0,head_list=1.0|1.2|2.3": row(
                    edits.ACT, (1, 2), threshold=0.04, beta=0, heads=((1, 0), (1, 2), (2, 3))
                ),
                "act:sinks=secondary,life=1|4,beta=0.1,layers=0-": lambda p: edits.ACT(
                    **p.at, layers=[*ALL], beta=0.1, secondary=p.secondary(1, 4)
                ),
            },
        ),
        edit(
            neutral=("ad_hh:threshold=1.5,head_list=0.0",),
            rows={
                "ad_hh:threshold=0.15,head_list=" + "|".join(f"{i}.{h}" for i, h in CUT): row(
                    edits.ADHH, (0, 1, 3), heads=CUT, threshold=0.15
                )
            },
        ),
        edit(
            neutral=("avar:visual=1,system=0",),
            rows={"avar:visual=1.8,system=0.4": row(edits.Factors, ALL, image=1.8, system=0.6)},
        ),
        edit(
            neutral=("cca:positions=false,mask=false",),
            refuses=CHUNKS,
            rows={
                "cca": lambda p: edits.CCA(**p.at, layers=[], grids=p.grids(), mrope="image_grid_thw" in p.inputs),
                "cca:mask=false": lambda p: edits.CCA(
                    **p.at, layers=[], grids=p.grids(), mrope="image_grid_thw" in p.inputs, mask=False
                ),
                "cca:positions=false": lambda p: edits.CCA(
                    **p.at, layers=[], grids=p.grids(), mrope="image_grid_thw" in p.inputs, positions=False
                ),
            },
        ),
        edit(
            neutral=("gift:alpha=0",),
            rows={
                "gift:alpha=3,source_layer=1,layers=2-3": row(
                    edits.GIFT, (1, 2, 3), rows="after_image", alpha=3, source=1, edited_layers=(2, 3)
                ),
                "gift:alpha=3,source_layer=1,layers=2-3,template=1|2": row(
                    edits.GIFT, (1, 2, 3), rows="after_image", alpha=3, source=1, edited_layers=(2, 3), template=(1, 2)
                ),
                "gift:alpha=2,source_layer=2,layers=1-3": row(
                    edits.GIFT, (1, 2, 3), rows="after_image", alpha=2, source=2, edited_layers=(1, 2, 3)
                ),
                "gift:alpha=2,source_layer=3,layers=0-2": row(
                    edits.GIFT, (0, 1, 2, 3), rows="after_image", alpha=2, source=3, edited_layers=(0, 1, 2)
                ),
            },
        ),
        edit(neutral=("hgai:alpha=0",), rows={"hgai:alpha=1,layers=0-": row(edits.HGAI, ALL, alpha=1)}),
        edit(neutral=("locore:beta=0",), rows={"locore:beta=2,window=3": row(edits.LocoRE, ALL, beta=2, window=3)}),
        edit(
            "pai:alpha=0.5",
            "pai:alpha=0.5,gamma=1.3",
            neutral=("pai:alpha=0",),
            rows={"pai:alpha=0.7,layers=1-": row(ref.PaiReference, (1, 2, 3), alpha=0.7)},
        ),
        edit(
            neutral=("paint:alpha=0,beta=0",),
            rows={
                "paint:alpha=1,beta=0.7,layers=0-": lambda p: edits.PAINT(
                    **p.at, layers=[*ALL], alpha=1, beta=0.7, encoder=p.encoder()
                ),
                "paint:alpha=3,beta=1,head_scale=sensitive,layers=0-": lambda p: edits.PAINT(
                    **p.at, layers=[*ALL], alpha=3, beta=1, sensitive=True, encoder=p.encoder()
                ),
            },
        ),
        edit(
            neutral=("pade:lam=0",),
            rows={
                "pade:lam=6": row(edits.PADE, ALL, lam=6),
                "pade:lam=250,scaled=false,layers=0|2-3": row(edits.PADE, (0, 2, 3), lam=250, scaled=False),
            },
        ),
        edit(
            neutral=("farsight:registers=0",),
            rows={
                "farsight:sigma=0.01,slopes=one": lambda p: edits.FarSight(
                    **p.at, layers=[*ALL], **p.moved("farsight", sigma=0.01, slopes="one")
                ),
                "farsight:sigma=0.3,registers=20,slopes=alibi,layers=1-2": lambda p: edits.FarSight(
                    **p.at, layers=[1, 2], registers=20, **p.moved("farsight", sigma=0.3, slopes="alibi")
                ),
            },
        ),
        edit("pine", neutral=("pine:order=given,mask=false",), refuses=CHUNKS),
        edit(
            neutral=("tame:gamma=0",),
            refuses=CHUNKS,
            rows={
                "tame:gamma=0.4": lambda p: edits.TAME(**p.at, layers=[*ALL], gamma=0.4, windows=p.windows),
                "tame:gamma=1,layers=1|3": lambda p: edits.TAME(**p.at, layers=[1, 3], gamma=1, windows=p.windows),
            },
        ),
        edit(
            neutral=("vaf:enhance=1,suppress=1",),
            rows={"vaf:enhance=2,suppress=0.5,layers=0-": row(edits.Factors, ALL, image=2, system=0.5)},
        ),
        edit(
            f"var:{VAR_TINY}",
            neutral=("var:p=0",),
            rows={
                "var:tau=2,min_visual_mass=0.1,rho=0.2,p=0.9,layers=0-": row(
                    ref.VarReference, ALL, tau=2, rho=0.2, min_visual_mass=0.1, p=0.9
                ),
                "var:sink_dims=3|17|40,p=0.9,tau=1.5,min_visual_mass=0.1,rho=0.2,layers=0-": row(
                    ref.VarReference, ALL, tau=1.5, rho=0.2, min_visual_mass=0.1, dims=(3, 17, 40), p=0.9
                ),
                "var:detector=secondary,life=0|5,min_visual_mass=0,rho=0,p=0.9,layers=0-": lambda p: ref.VarReference(
                    **p.at, layers=[*ALL], p=0.9, rho=0, min_visual_mass=0, secondary=p.secondary(0, 5)
                ),
            },
        ),
        edit(
            neutral=("visual_topk:k=1.0", "visual_topk:k=1000"),
            rows={
                "visual_topk:k=5": row(edits.VisualTopK, ALL, k=5),
                "visual_topk:k=0.05,choosers=0|1": row(edits.VisualTopK, ALL, k=0.05, choosers=(0, 1)),
            },
        ),
        edit(
            neutral=("zerotuning:rate=1",),
            rows={
                "zerotuning:rate=0.1": row(edits.ZeroTuning, ALL, rate=0.1),
                "zerotuning:rate=9,head_indices=0|3,layers=1-2": row(edits.ZeroTuning, (1, 2), rate=9, heads=(0, 3)),
            },
        ),
        edit(
            neutral=("head_pursuit:head_list=1.2,factor=1",),
            rows={
                "head_pursuit:head_list=1.0|3.2|3.3,factor=-1": row(
                    edits.HeadPursuit, (1, 3), factors={(1, 0): -1, (3, 2): -1, (3, 3): -1}
                ),
                "head_pursuit:head_list=0.1|2.2,factor=3,prompt_rows=all": row(
                    edits.HeadPursuit, (0, 2), rows="all", factors={(0, 1): 3, (2, 2): 3}
                ),
            },
        ),
        edit("random_heads:seed=1,layers=1-3", neutral=("random_heads:alpha=1",)),
        edit(
            neutral=("spin:keep=1", "spin:epsilon=1"),
            rows={
                "spin:keep=0.8,epsilon=0.1,layers=0-": row(edits.SPIN, ALL, keep=3, epsilon=0.1),
                "spin:keep=0.25,epsilon=0,layers=1|3": row(edits.SPIN, (1, 3), keep=1, epsilon=0),
            },
        ),
        edit(
            "vhr",
            neutral=("vhr:alpha=1",),
            rows={
                "vhr:layers=0-": lambda p: ref.VhrReference(**p.at, layers=[*ALL], text=p.text()),
                "vhr:prompt_rows=all,alpha=1.5": lambda p: ref.VhrReference(
                    **p.at, layers=[1, 2, 3], rows="all", alpha=1.5, text=p.text()
                ),
            },
        ),
        edit(
            neutral=(f"{IRI},lambda_a=0,lambda_m=0".replace("lambda_a=4,lambda_m=4,", ""), "iri:lambda_a=0,lambda_m=0"),
            rows={IRI: row(edits.IRI, ALL, rates=RATES, strength={"attention": 4, "mlp": 4}, sources=2, targets=3)},
        ),
        edit(
            "vista:lam=0.4",
            "vista:lam=0,alpha=0.6",
            neutral=("vista:lam=0,alpha=0",),
            rows={
                "vista:lam=0.5,alpha=0": lambda p: hidden.vista(p, ALL, lam=0.5),
                "vista:lam=0.9,alpha=0,prompt_rows=last,layers=1-2": lambda p: hidden.vista(
                    p, (1, 2), lam=0.9, rows="last"
                ),
            },
        ),
        edit(
            neutral=("nullu:rank=0",),
            rows={
                f"nullu:file={SUBSPACE},rank=3,layers=1-": row(hidden.Nullu, (1, 2, 3), rank=3),
                f"nullu:file={SUBSPACE},rank=6,layers=0|2": row(hidden.Nullu, (0, 2), rank=6),
            },
        ),
        edit(
            f"vti:file={VTI},alpha_text=3,alpha_vision=3",
            neutral=("vti:alpha_text=0,alpha_vision=0",),
            rows={
                f"vti:file={VTI},alpha_text=4,alpha_vision=0": row(hidden.VTI, ALL, text=4),
                f"vti:file={VTI},alpha_text=2,alpha_vision=5,layers=1-2": row(hidden.VTI, (1, 2), text=2, vision=5),
            },
        ),
        edit(
            neutral=("rudder:alpha=0", "rudder:absolute=0"),
            rows={
                "rudder:alpha=0.8,layers=2": row(hidden.Rudder, (2,), alpha=0.8),
                "rudder:absolute=6,k=8,gate_on=attention,pool=mean,layers=1": row(
                    hidden.Rudder, (1,), absolute=6, k=8, on="attention", pool="mean"
                ),
                "rudder:alpha=0.5,gated=false,layers=0|3": row(hidden.Rudder, (0, 3), alpha=0.5, gated=False),
            },
        ),
        edit(
            neutral=("steer:strength=0",),
            rows={
                f"steer:file={DIRECTIONS},strength=0.3": row(hidden.Steer, ALL, strength=0.3),
                f"steer:file={DIRECTIONS},absolute=-0.2,place=mlp_output,prompt_rows=all,layers=1-2": row(
                    hidden.Steer, (1, 2), absolute=-0.2, place="mlp_output", rows="all"
                ),
                f"steer:file={DIRECTIONS},strength=-0.6,keep_norm=true,place=attention_output": row(
                    hidden.Steer, ALL, strength=-0.6, keep=True, place="attention_output"
                ),
            },
        ),
        edit(
            "memvr:ratio=0.9,threshold=0.6,layers=0-2",
            neutral=("memvr:ratio=0", "memvr:threshold=1"),
            refuses=CHUNKS,
            rows={
                "memvr:ratio=0.9,threshold=0.75,layers=0-2": lambda p: hidden.MemVR(
                    **p.at, layers=[0, 1, 2], ratio=0.9, **p.moved("memvr", threshold=0.75)
                ),
                "memvr:ratio=1,threshold=0.75,layers=1,prompt_rows=last": lambda p: hidden.MemVR(
                    **p.at, layers=[1], ratio=1, rows="last", **p.moved("memvr", threshold=0.75)
                ),
            },
        ),
        edit(
            "hulluedit:kappa=2,lam=3",
            neutral=("hulluedit:blend=0", "hulluedit:kappa=0,lam=0"),
            refuses={"num_beams": "does not go with beam search"},
            rows={
                "hulluedit:anchor=2,rank=6,prior_rank=3,kappa=2,lam=3,pcr_threshold=0.05": lambda p: hidden.HulluEdit(
                    **p.at,
                    layers=[2],
                    kappa=2,
                    lam=3,
                    **p.moved("hulluedit", rank=6, prior_rank=3, pcr_threshold=0.05),
                )
            },
        ),
        edit("only:beta=0.01", neutral=("only:alpha=0,alpha_add=0",)),
        edit(
            "random_direction:strength=0.4,seed=3",
            "random_direction:strength=0.3,place=layer_output,prompt_rows=last",
            neutral=("random_direction:strength=0",),
        ),
        edit(
            neutral=("random_reminder:alpha=0", "random_reminder:absolute=0"),
            rows={
                "random_reminder:alpha=0.8,layers=2,seed=3": row(hidden.Rudder, (2,), alpha=0.8, drawn=3),
                "random_reminder:absolute=6,k=8,gate_on=attention,pool=mean,layers=1": row(
                    hidden.Rudder, (1,), absolute=6, k=8, on="attention", pool="mean", drawn=0
                ),
            },
        ),
        edit("random_subspace:rank=20,layers=0-", neutral=("random_subspace:rank=0",)),
        # contrasts
        edit(
            "ascd:head_list=1.0|1.3|2.2|3.1,beta=0.01",
            "ascd:head_list=1.0|1.3|2.2|3.1,alpha=0",
            neutral=("ascd:alpha=0,boost=0", "ascd:damp=0,boost=0"),
        ),
        edit("attention_buckets:bases=0.02|30", neutral=("attention_buckets:bases=1|1",)),
        edit("avisc:beta=0.01", neutral=("avisc:alpha=0",)),
        edit("causalmm:beta=0.01", neutral=("causalmm:gamma=0", "causalmm:vision=none,language=none")),
        edit("crops:decay=0.1,beta=0.01,gate=1", neutral=("crops:alpha=0,decay=0",)),
        edit("decore:head_list=1.0|1.3|2.2|3.1", neutral=("decore:alpha=0,head_list=1.0",)),
        edit("iava:tokens=21|22|23,beta=0.01", neutral=("iava:alpha=0",)),
        edit("icd:tokens=11|12|13,beta=0.01", neutral=("icd:alpha=0",)),
        edit(f"layercake:punctuation={MARKS},concepts={THINGS},beta=0.01", neutral=("layercake:alpha=0",)),
        edit("m3id:decay=0.3,beta=0.01", neutral=("m3id:decay=0",)),
        edit("owl:beta=0.01,base=0.9|2.5|1.4|1.4,layers=0-", neutral=("owl:alpha=0,beta_text=0",)),
        edit("ritual:mean=0.5|0.4|0.6,std=0.3|0.3|0.2,beta=0.01", neutral=("ritual:alpha=0",)),
        edit(f"marine:objects={OBJECTS}", neutral=("marine:gamma=0",)),
        edit(
            "shield:beta=0.01,steps=3,samples=3",
            "shield:alpha=0,bias=0.5,samples=2",
            neutral=("shield:alpha=0,bias=0",),
            refuses=CHUNKS,
        ),
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
        edit("image_sort:toward=ends,per=token", neutral=("image_sort:rounds=0",)),
        edit("sparc:boxes=0.1|0.2|0.5|0.7", neutral=("sparc:regions=0",)),
        loop(
            "opera:threshold=1,warmup=2,beams=3,candidates=3",
            neutral=("opera:weight=0",),
            do_sample="do_sample",
            streamer="streamer",
        ),
        loop("sgrs:layers=1-3,alpha=1", neutral=("sgrs:top_k=1",)),
        edit(
            "control_mllm:box=0.1|0.1|0.6|0.6,lr=0.001",
            "control_mllm:version=1,point=0.3|0.7,lr=0.5",
            neutral=("control_mllm:box=0|0|1|1,steps=0",),
            refuses=CHUNKS,
        ),
        edit(
            "draft:tokens=3",
            neutral=("draft:tokens=0",),
            refuses={"prompt_lookup_num_tokens": "draft drafts itself"},
            effect=False,
        ),
        # pruning before the language model, in its layers, in its cache
        pruner("agilepruner:slope=0.05"),
        pruner("cdpruner"),
        pruner("divprune"),
        pruner("downsample_image:keep=5", neutral=("downsample_image:keep=1.0", "downsample_image:keep=1000")),
        pruner("fastvid", "fastvid:keep=5"),
        pruner("flowcut"),
        pruner("hiprune:keep=4", neutral=("hiprune:keep=1.0", "hiprune:keep=1000")),
        pruner("holov:crops=5"),
        pruner("prumerge:neighbours=3", "prumerge:adaptive=true"),
        pruner("random_tokens"),
        pruner("scope"),
        pruner("uniform_grid"),
        pruner("visiontrim:complement=0.4", "visiontrim:rating=received,reach=2"),
        pruner("visionzip:contextual=0.4"),
        pruner("vispruner:step=3"),
        pruner(
            "vscan:windows=2",
            "vscan:windows=2,llm_keep=1",
            neutral=("vscan:windows=2,llm_keep=1,keep=1.0", "vscan:windows=2,llm_keep=1,keep=1000"),
        ),
        pruner("zoo_prune:directions=3,seed=4"),
        pruner("dart:keep=6", neutral=("dart:keep=1.0", "dart:keep=99")),
        pruner("fastv:keep=5", neutral=("fastv:keep=1.0", "fastv:keep=99")),
        pruner("ptp:keep=4", neutral=("ptp:keep=99",)),
        pruner("pyramid_drop", neutral=("pyramid_drop:keep=99|99|99",)),
        pruner("sparsevlm", neutral=("sparsevlm:keep=1|99|1",)),
        pruner(
            "a_vl:core=0.2,text_start=3,text_every=2",
            num_beams="a_vl does not work with beams",
            neutral=("a_vl:keep=99,core=1,text_keep=1", "a_vl:keep=1,every=1,text_start=99"),
        ),
        pruner("expected_attention:keep=3", neutral=("expected_attention:keep=99",)),
        pruner("kvcompose:keep=3", neutral=("kvcompose:keep=99", "kvcompose:keep=1.0")),
        pruner("razor:head_list=1.0|2.3", neutral=("razor:head_list=1.0,keep=99", "razor:head_list=1.0,keep=1.0")),
        pruner("knorm:keep=3", neutral=("knorm:keep=99", "knorm:keep=1.0")),
    )
}
ROWS = {spec: reference for case in CASES.values() for spec, reference in case.rows.items()}
SPECS = {spec: case for case in CASES.values() for spec in case.specs}
NEUTRAL = [spec for case in CASES.values() for spec in case.neutral]


def named(spec: str) -> str:
    """A test's id: the spec, short enough to read."""
    return spec if len(spec) < 80 else f"{spec[:77]}..."
