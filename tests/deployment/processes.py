"""Two gloo processes: data parallel, fully sharded and tensor parallel. `torchrun` starts it; prints {check: outcome} as JSON.

Each process also runs the tiny model by itself: what it says alone is what it has to say in company.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlavaForConditionalGeneration

import vlm_fix
from tests.deployment.kinds import KINDS, STEPS
from tests.support.models import make_inputs, tiny_llava

ATTENTION = ("attention", "heads", "pruning in layers", "pruning of the cache", "procedure")
FORWARD = [
    kind for kind in KINDS if kind not in ("contrast", "logits", "procedure")
]  # the others act in generate alone


def logits(model, inputs):
    return model(**inputs).logits


def tokens(model, inputs):
    return model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[:, -STEPS:]


def alike(one, other):
    return one.shape == other.shape and float((one.float() - other.float()).abs().max()) < 1e-4


def data_parallel(inputs, expected):
    """DDP around a wrapped model, and wrap of a DDP: the forward is edited, and comes off exactly."""
    model = tiny_llava()
    for kind in FORWARD:
        with vlm_fix.wrapped(model, KINDS[kind]):
            assert alike(logits(DistributedDataParallel(model), inputs), expected[kind]), f"DDP(wrapped), {kind}"
        outer = DistributedDataParallel(model)
        with vlm_fix.wrapped(outer, KINDS[kind]):
            assert alike(logits(outer, inputs), expected[kind]), f"wrapped DDP, {kind}"
        assert torch.equal(logits(outer, inputs), expected[None]), f"unwrapped DDP, {kind}"
    with vlm_fix.wrapped(outer, KINDS["contrast"]):
        assert torch.equal(tokens(outer.module, inputs), expected["contrast tokens"]), "generate of the model inside"


def fully_sharded(inputs, expected):
    """FSDP2: the forward and `generate` of a sharded model."""
    model = tiny_llava()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert alike(logits(model, inputs), expected[None]), "the plain sharded model"
    for kind in FORWARD:
        with vlm_fix.wrapped(model, KINDS[kind]):
            assert alike(logits(model, inputs), expected[kind]), kind
    for kind in ("contrast", "logits"):
        with vlm_fix.wrapped(model, KINDS[kind]):
            assert torch.equal(tokens(model, inputs), expected[f"{kind} tokens"]), kind
    assert alike(logits(model, inputs), expected[None]), "unwrapped"


def tensor_parallel(inputs, expected, folder):
    """tp_plan="auto": what works on all heads is refused at wrap, everything else is right."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, tp_plan="auto").eval()
    model.generation_config.eos_token_id = None
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.shape[0] in (32, 64)
    assert alike(logits(model, inputs), expected[None]), "the plain model"
    for kind, spec in KINDS.items():
        if kind in ATTENTION:
            try:
                vlm_fix.wrap(model, spec)
            except vlm_fix.VlmFixError as error:
                assert "tensor parallelism leaves each of 2 processes a part" in str(error), error
                assert "generate" not in vars(model)
                continue
            raise AssertionError(f"{kind} was not refused")
        with vlm_fix.wrapped(model, spec):
            assert torch.equal(tokens(model, inputs), expected[f"{kind} tokens"]), kind
    assert alike(logits(model, inputs), expected[None]), "unwrapped"


@torch.no_grad()
def main(folder: str) -> None:
    """Run the program; `folder` is a place for the tiny model's files."""
    dist.init_process_group("gloo")
    inputs, model = make_inputs("llava", [1, 2]), tiny_llava()
    expected = {None: logits(model, inputs)}
    for kind, spec in KINDS.items():
        with vlm_fix.wrapped(model, spec):
            expected[f"{kind} tokens"] = tokens(model, inputs)
            if kind in FORWARD:
                expected[kind] = logits(model, inputs)
    assert not alike(expected["attention"], expected[None])
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    outcome = {}
    checks = {
        "data parallel": lambda: data_parallel(inputs, expected),
        "fully sharded": lambda: fully_sharded(inputs, expected),
        "tensor parallel": lambda: tensor_parallel(inputs, expected, folder),
    }
    for name, check in checks.items():
        try:
            check()
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc(limit=-4)
        dist.barrier()
    if dist.get_rank() == 0:
        json.dump(outcome, sys.stdout)
        sys.stdout.flush()
    os._exit(0)  # gloo's threads may wait for a peer that is gone


if __name__ == "__main__":
    main(sys.argv[1])
