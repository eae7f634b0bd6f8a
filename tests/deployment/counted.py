"""What an accelerator would feel of every method, counted on a pretended one: `python -m tests.deployment.counted FAMILY`.

It prints {spec: what was counted} as JSON: the answer against the CPU's, operations per layer, and operations, syncs and copies
per token in decode steps; after it, specs to count, then also by line. `python -m tests.deployment.counted budget` writes
`budget.json`, what every method may cost, which `test_counts.py` holds; after it, methods that are to be counted anew.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
import warnings
from pathlib import Path

import torch

import vlm_fix
from tests.support import pretended
from tests.support.cases import CASES
from tests.support.product import inputs_of, model_of, spec_of
from vlm_fix import launches
from vlm_fix.errors import VlmFixError
from vlm_fix.families import arch_of, final_norm, get_part

BUDGET = Path(__file__).with_name("budget.json")
FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "internvl")
STEPS, FIRST = 7, 3  # steps that are counted: from the FIRST new token on, what is made once is there
PARTS = 4  # a run of the suite counts one of them
DIFFERENTIATES = {"control_mllm", "shield"}  # autograd has no queue for a device in Python
METHODS = [name for name in CASES if name not in DIFFERENTIATES]


def methods_of(family: str) -> list[str]:
    """Every method on the first family, which is counted, and on one of the others, where a padded batch has to agree."""
    others = FAMILIES[1:]
    return METHODS if family == FAMILIES[0] else METHODS[others.index(family) :: len(others)]


def specs_of(family: str, part: int | None = None) -> list[str]:
    """Their specs, of one part of them or of all."""
    chosen = [m for i, m in enumerate(methods_of(family)) if part in (None, i % PARTS)]
    return [spec_of(m, family) for m in dict.fromkeys(["baseline", *chosen])]


def extras(figures: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Per method, what it costs beyond the plain model: times its operations in the costliest layer, and per token."""
    plain, made = figures["baseline"], {}
    untouched = min(plain["layers"]) - 1  # a wrapped model's decode row does without one view
    for spec, own in figures.items():
        if "layers" in own and spec != "baseline":
            times = [a / b for a, b in zip(own["layers"], plain["layers"], strict=True)]
            edited = [t for t, n in zip(times, own["layers"], strict=True) if n > untouched] or [max(times)]
            mean = sum(own["layers"]) / sum(plain["layers"])
            made[spec.partition(":")[0]] = {
                "layer": round(max(edited[1:] or edited), 3),  # the first edited layer also prepares the forward
                "layers": round(mean, 3),
                "step": round(own["operations"] / plain["operations"], 3),
                "syncs": round(own["syncs"] - plain["syncs"], 2),
                "copies": round(own["copies"] - plain["copies"], 2),
            }
    return made


def answer(model, inputs):
    torch.manual_seed(0)
    return model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[:, -STEPS:].cpu().tolist()


class Places:
    """Says where the model is: (generated tokens so far, layer), from forwards of its own parts."""

    def __init__(self, model):
        family = arch_of(model).family
        language = get_part(model, family.language)
        self.base, self.norm = get_part(model, family.base), final_norm(language)
        self.layers = {id(layer): i for i, layer in enumerate(language.layers)}
        self.token = -1

    def __call__(self, module, args):
        if id(module) in self.layers:
            pretended.at.place = self.token, self.layers[id(module)]
        elif module is self.norm:
            pretended.at.place = self.token, None

    def next_token(self, ids, scores, **kwargs):
        """A stopping criterion that never stops."""
        self.token += 1
        pretended.at.place = self.token, None
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def counted(model, inputs, sites=False):
    """-> (tokens, figures): operations by layer, and operations, syncs and copies per token, mean over the counted steps."""
    places = Places(model)
    pretended.counts.clear()
    pretended.sites.clear()
    pretended.at.lines = sites
    hook = torch.nn.modules.module.register_module_forward_pre_hook(places)
    try:
        torch.manual_seed(0)
        pretended.at.place = -1, None
        out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, stopping_criteria=[places.next_token])
    finally:
        hook.remove()
        pretended.at.place = None
    steps = range(FIRST, STEPS - 1)

    def mean(what, layer=lambda i: True):
        total = sum(n for (kind, at), n in pretended.counts.items() if kind == what and at[0] in steps and layer(at[1]))
        return round(total / len(steps), 2)

    depth = len(places.layers)
    figures = {
        "layers": [mean("operations", lambda i, own=own: i == own) for own in range(depth)],
        "operations": mean("operations"),
        "syncs": mean("syncs"),
        "copies": mean("copies"),
    }
    if sites:
        found = [(what, at[1], line, n) for (what, at, line), n in pretended.sites.items() if at[0] in steps]
        figures["sites"] = sorted(found, key=str)
    return out[:, -STEPS:].held.tolist(), figures


def count(family: str, specs: list[str], sites: bool = False) -> dict[str, dict]:
    batch = family != FAMILIES[0]
    inputs, here = inputs_of(family, batch), model_of(family)
    outcome, expected = {}, {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for spec in specs:
            try:
                with vlm_fix.wrapped(here, spec):
                    expected[spec] = answer(here, inputs)
            except VlmFixError as error:  # not for this family, or for one prompt alone
                expected[spec] = str(error)
        twin = copy.deepcopy(here)
        launches.use(not batch)  # as on a GPU; the other families show what is without that kernel
        with pretended.on():
            there = pretended.move(twin)
            placed = {k: pretended.put(v) for k, v in inputs.items()}
            for spec in specs:
                try:
                    vlm_fix.wrap(there, spec)
                    tokens, figures = counted(there, placed, sites)
                    wrong = "" if tokens == expected[spec] else f"{tokens}, on the CPU {expected[spec]}"
                    outcome[spec] = {"error": wrong, **figures}
                except VlmFixError as error:
                    wrong = "" if str(error) == expected[spec] else f"{error}, on the CPU {expected[spec]}"
                    outcome[spec] = {"error": wrong}
                except Exception:
                    outcome[spec] = {"error": traceback.format_exc(limit=-6)}
                finally:
                    vlm_fix.unwrap(there)
    return outcome


def main(asked: list[str]) -> int:
    """Run the program; the module docstring says what it prints."""
    if why := pretended.register():
        print(json.dumps({"skip": why}))
        return 0
    if asked[0] == "budget":
        known = json.loads(BUDGET.read_text()) if BUDGET.exists() and asked[1:] else {}
        specs = [spec_of(m, FAMILIES[0]) for m in dict.fromkeys(["baseline", *(asked[1:] or METHODS)])]
        found = count(FAMILIES[0], specs)
        wrong = {spec: own["error"] for spec, own in found.items() if own["error"]}
        made = dict(sorted({**known, **extras(found)}.items()))
        lines = ",\n".join(f" {json.dumps(method)}: {json.dumps(cost)}" for method, cost in made.items())
        BUDGET.write_text(f"{{\n{lines}\n}}\n")
        print(json.dumps(wrong, indent=1), file=sys.stderr)
        return bool(wrong)
    family, *rest = asked
    part = int(rest[0]) if rest and rest[0].isdigit() else None
    specs = specs_of(family, part) if part is not None or not rest else ["baseline", *rest]
    json.dump(count(family, specs, sites=bool(rest) and part is None), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
