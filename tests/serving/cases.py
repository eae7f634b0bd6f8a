"""One spec that acts for every method that is served; the table of docs/serving.md is made from these lists."""

SERVED = {
    "attention": (
        "pai:alpha=1", "vaf:enhance=1.5", "avar:system=0.4", "hgai", "spin:keep=0.5", "locore:beta=1", "gift", "paint",
        "paint:head_scale=sensitive", "zerotuning", "zerotuning:rate=0.2,head_indices=1|3",
        "var:sink_dims=0|1|2,tau=1.5,rho=0,min_visual_mass=0",
    ),
    "heads": ("vhr", "ad_hh:threshold=0.05", "head_pursuit", "random_heads"),
    "hidden states": ("iri",),
    "next token": ("apc_only", "gaussian_logits", "yes_threshold:margin=0.9", "deco", "dola"),
    "second branch": ("vcd", "icd", "m3id", "yes_bias", "pai:gamma=1.5"),
    "stacks": ("pai:alpha=0.5+vcd", "vhr+pai", "iri+m3id", "vaf+apc_only:beta=0.3", "locore:beta=1+pai"),
}  # fmt: skip
PRUNERS = (
    "hiprune:keep=16", "visionzip:keep=16", "divprune:keep=16", "random_tokens:keep=16", "uniform_grid:keep=16",
    "zoo_prune:keep=16", "hiprune:keep=16+pai:alpha=0.5",
)  # fmt: skip
SPECS = [spec for specs in SERVED.values() for spec in specs]
LITTLE = (
    "apc_only",
)  # greedy decoding leaves their tokens alone, and with sure answers their log-probabilities nearly so


def names(spec: str) -> list[str]:
    """The methods of a stack."""
    return [part.partition(":")[0] for part in spec.split("+")]
