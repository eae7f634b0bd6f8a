"""One model over two pretended devices, as `device_map` lays it: each kind of method. Prints {spec: outcome} as JSON."""

from __future__ import annotations

import json
import sys
import traceback

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device

import vlm_fix
from tests.deployment.kinds import KINDS, STEPS
from tests.support import pretended
from tests.support.models import make_inputs, tiny_llava

# autograd has no queue for a device in Python, so that no procedure that differentiates can run; stages at layer 2 lie where
# the device changes
SPECS = [s for k, s in KINDS.items() if k != "procedure"] + [
    "opera:warmup=1,beams=2,candidates=2",
    "pyramid_drop",
    "sparsevlm",
    "memvr:threshold=0.5",
    "memvr:threshold=0.5,prompt_rows=last,layers=0-2",
]


class Aligned(ModelHook):
    """accelerate's AlignDevicesHook without its moving of weights: inputs come to the module's device."""

    def __init__(self, index):
        self.device = torch.device(pretended.NAME, index)

    def pre_forward(self, module, *args, **kwargs):
        return send_to_device(args, self.device), send_to_device(kwargs, self.device)


class Returned(ModelHook):
    """The whole model's output comes back to the device of its input."""

    def post_forward(self, module, output):
        return send_to_device(output, torch.device(pretended.NAME, 0))


def shared_out(model):
    """Tower, embeddings and the first two layers on device 0; the others, the norm and the head on device 1."""
    language = model.model.language_model
    second = [*language.layers[2:], language.norm, model.lm_head]
    for part in second:
        pretended.move(part, 1)
    pretended.move(model, 0)
    for part in (
        model.model.vision_tower,
        model.model.multi_modal_projector,
        language.embed_tokens,
        *language.layers[:2],
    ):
        add_hook_to_module(part, Aligned(0))
    for part in second:
        add_hook_to_module(part, Aligned(1))
    add_hook_to_module(model, Returned())
    model.hf_device_map = {"model": 0, "lm_head": 1}
    return model


def tokens(model, inputs):
    return model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[:, -STEPS:].cpu().tolist()


def main() -> None:
    """Run the program; the module docstring says what it prints."""
    if why := pretended.register():
        print(json.dumps({"skip": why}))
        return
    inputs, outcome = make_inputs("llava", [1, 2]), {}
    with torch.no_grad():
        here = tiny_llava()
        expected = {None: tokens(here, inputs)}
        for spec in SPECS:
            with vlm_fix.wrapped(here, spec):
                expected[spec] = tokens(here, inputs)
        with pretended.on():
            there, placed = shared_out(tiny_llava()), {k: pretended.put(v) for k, v in inputs.items()}
            for spec in (None, *SPECS):
                try:
                    if spec:
                        vlm_fix.wrap(there, spec)
                    found = tokens(there, placed)
                    outcome[str(spec)] = "" if found == expected[spec] else f"{found}, on the CPU {expected[spec]}"
                except Exception:
                    outcome[str(spec)] = traceback.format_exc(limit=-4)
                finally:
                    vlm_fix.unwrap(there)
    assert expected["pai:alpha=1"] != expected[None] != expected["vcd:alpha=2,beta=0.01"]
    json.dump(outcome, sys.stdout)


if __name__ == "__main__":
    main()
