"""The methods of each kind of bench, with settings under which they do their usual work on random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vlm_fix import registry
from vlm_fix.attention.edits import AttentionEdit
from vlm_fix.method import Method

KINDS = ("attention", "decode", "prune")
# Random weights pass no gate and have neither calibration nor tokenizer; these settings make each method act anyway.
HEADS = "1.0|2.3|3.5|4.1|4.6|5.2|6.0|6.7"  # layer.head
SPECS = {
    "act": f"act:head_list={HEADS},threshold=0.001",
    "ad_hh": f"ad_hh:head_list={HEADS},threshold=0",
    "carve": "carve:tokens=11|12|13,black=-1.79|-1.75|-1.48",
    "control_mllm": "control_mllm:box=0.2|0.2|0.7|0.7",
    "decore": f"decore:head_list={HEADS}",
    "head_pursuit": f"head_pursuit:head_list={HEADS}",
    "iava": "iava:tokens=11|12|13|14|15|16|17|18",
    "layercake": "layercake:punctuation=11|12|13,concepts=14|15|16|17|18",
    "icd": "icd:tokens=11|12|13|14|15|16|17|18",
    "iri": "iri:rr_attention=RATES,rr_mlp=RATES",
    "memvr": "memvr:threshold=0",
    "sparc": "sparc:boxes=0.2|0.2|0.7|0.7",
    "var": "var:tau=2.5,min_visual_mass=0,rho=0",
    "yes_threshold": "yes_threshold:yes=11,no=12",
    "yes_bias": "yes_bias:tokens=11|12|13|14",
}


def chosen(kind: str, methods: Sequence[str], depth: int, keep: Sequence[float]) -> list[str]:
    """Return the specs to time: `methods`, or all of the kind and their references; pruners at each budget in `keep`."""
    specs = [spec_of(spec, depth) for spec in methods] if methods else methods_of(kind, depth)
    if kind == "prune":
        return ["+".join(_with_keep(part, k) for part in spec.split("+")) for k in keep for spec in specs]
    if methods:
        return specs
    if kind == "decode":
        return [*specs, "hf-cfg"]
    return specs + [
        f"{s} @ eager" for s in specs if issubclass(registry.get_method(s.partition(":")[0]), AttentionEdit)
    ]


def methods_of(kind: str, depth: int = 8) -> list[str]:
    """Return the specs of all registered methods of a bench kind, see `spec_of`; none that reads a file of its own."""
    own = [m for m in registry.list_methods() if "file" not in {field.name for field in dataclasses.fields(m)}]
    return [spec_of(m.name, depth) for m in own if _kind(m) == kind]


def spec_of(name: str, depth: int = 8) -> str:
    """Return a spec with which the method does its usual work on a random-weight model of `depth` layers."""
    rates = "|".join(f"{(depth - i) / depth:.3g}" for i in range(depth))
    return SPECS.get(name, name).replace("RATES", rates)


def _kind(method: type[Method]) -> str:
    if method.kind == "pruning":
        return "prune"
    inside = issubclass(method, AttentionEdit) or method.kind == "hidden"
    if inside and method.kind not in ("contrast", "logits", "procedure"):  # these only use an edit
        return "attention"
    return "decode" if method.name != "baseline" else ""


def keep_of(spec: str) -> str:
    """Return the budget as written in a spec, such as keep=64."""
    return next((p for p in spec.replace(":", ",").split(",") if p.startswith("keep=")), "")


def _with_keep(spec: str, keep: float) -> str:
    if "keep=" in spec or registry.get_method(spec.partition(":")[0]).kind != "pruning":
        return spec
    return f"{spec}{',' if ':' in spec else ':'}keep={keep:g}"
