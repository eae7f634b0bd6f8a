"""One spec that acts for every method that is served; the table of docs/serving.md is made from these lists.

DIRECTIONS, SUBSPACE and VTI stand for safetensors files and OBJECTS for objects.json, see `filled`.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

SERVED = {
    "attention": (
        "pai:alpha=1", "vaf:enhance=1.5", "avar:system=0.4", "hgai", "spin:keep=0.5", "locore:beta=1", "gift", "paint",
        "paint:head_scale=sensitive", "zerotuning", "zerotuning:rate=0.2,head_indices=1|3",
        "var:sink_dims=0|1|2,tau=1.5,rho=0,min_visual_mass=0", "visual_topk:k=5", "visual_topk:k=0.1,choosers=0|2",
        "farsight", "farsight:sigma=0.3,registers=256,slopes=alibi", "pade:lam=1",
    ),
    "heads": ("vhr", "vhr:prompt_rows=all", "ad_hh:threshold=0.05", "head_pursuit", "random_heads"),
    "hidden states": (
        "iri", "steer:file=DIRECTIONS,strength=0.4", "steer:file=DIRECTIONS,place=mlp_output,prompt_rows=all,absolute=0.3",
        "nullu:file=SUBSPACE,rank=6", "vti:file=VTI,alpha_text=3,alpha_vision=3", "rudder:layers=3,alpha=1",
        "memvr:threshold=0.05,ratio=0.5", "memvr:threshold=0.05,ratio=0.5,prompt_rows=last", "hulluedit:kappa=1",
        "random_direction:strength=0.5", "random_subspace:rank=32", "random_reminder:layers=3,alpha=1",
        "vista", "vista:lam=1,alpha=0,prompt_rows=last",
    ),
    "next token": ("apc_only", "gaussian_logits", "yes_threshold:margin=0.9", "deco", "dola"),
    "second branch": ("vcd", "vcd:gate=0.9", "icd", "m3id", "marine:objects=OBJECTS", "ritual", "yes_bias", "pai:gamma=1.5",
                      "pai:branch=negative,gamma=1.5", "ascd", "decore", "layercake"),
    "stacks": ("pai:alpha=0.5+vcd", "vhr+pai", "iri+m3id", "vaf+apc_only:beta=0.3", "locore:beta=1+pai",
               "hulluedit+deco", "memvr:threshold=0.05+pai", "vhr+vcd", "gift+deco"),
}  # fmt: skip
PRUNERS = (
    "hiprune:keep=16", "visionzip:keep=16", "divprune:keep=16", "random_tokens:keep=16", "uniform_grid:keep=16",
    "zoo_prune:keep=16", "agilepruner:keep=16", "cdpruner:keep=16,theta=0", "flowcut:keep=16", "holov:keep=16",
    "prumerge:keep=16,layer=5", "scope:keep=16", "vispruner:keep=16", "visiontrim:keep=16,complement=0",
    "hiprune:keep=16+pai:alpha=0.5",
)  # fmt: skip
SPECS = [spec for specs in SERVED.values() for spec in specs]
LITTLE = (
    "apc_only",
    "yes_threshold:margin=0.9",  # there may be no question today about which the model is torn
)  # greedy decoding leaves their tokens alone, and with sure answers their log-probabilities nearly so


def names(spec: str) -> list[str]:
    """The methods of a stack."""
    return [part.partition(":")[0] for part in spec.split("+")]


def filled(spec: str) -> str:
    """With files that hold random vectors of picto-llava's sizes, the same each time, in place of the names."""
    import torch
    from safetensors.torch import save_file

    from vlm_fix.eval.picto import model_path

    config = json.loads((Path(model_path()) / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    depth, width = text["num_hidden_layers"], text["hidden_size"]

    def drawn(seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    made = {
        "DIRECTIONS": {f"direction.{i}": drawn(i, width) for i in range(depth)},
        "SUBSPACE": {f"layers.{i}": drawn(50 + i, 6, width) for i in range(depth)},
        "VTI": {f"text.{i}": drawn(100 + i, width) for i in range(depth)}
        | {f"vision.{i}": drawn(150 + i, vision["hidden_size"]) for i in range(vision["num_hidden_layers"])},
    }
    folder = Path(tempfile.gettempdir()) / "vlm-fix-serving"

    def file(found: re.Match[str]) -> str:
        folder.mkdir(exist_ok=True)
        save_file(made[found[0]], folder / f"{found[0]}.safetensors")
        return str(folder / f"{found[0]}.safetensors")

    return re.sub("|".join(made), file, spec.replace("OBJECTS", str(Path(__file__).parent / "objects.json")))
