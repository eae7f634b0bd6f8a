"""One method of each kind, for runs that differ in where and how a model is held."""

from __future__ import annotations

STEPS = 4
RATES = "0.9|0.6|0.4|0.2"
KINDS = {
    "attention": "pai:alpha=1",
    "heads": "vhr:alpha=3",
    "hidden states": f"iri:lambda_a=2,lambda_m=2,rr_attention={RATES},rr_mlp={RATES}",
    "contrast": "vcd:alpha=2,beta=0.01",
    "logits": "dola:alpha=2,beta=0.01",
    "pruning before the LM": "hiprune:keep=4",
    "pruning in layers": "fastv:keep=4",
    "pruning of the cache": "knorm:keep=0.25",
    "procedure": "sgrs",
}
SPECS = tuple(KINDS.values())
