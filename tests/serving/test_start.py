"""What vLLM is without a method, and what a server refuses to start with."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.serving.support import CAPTION, Case, Vllm, cases
from vlm_fix.errors import VlmFixError
from vlm_fix.serving.paged import layout_of
from vlm_fix.serving.settings import Settings

PROMPTS = [*cases(4), Case((1, 2), CAPTION), Case((), CAPTION)]
PLAIN = """
import json
from tests.serving.support import Vllm
from tests.serving.test_start import PROMPTS
engine = Vllm(None)
print("ANSWERS", json.dumps([[a.tokens, a.logs] for a in engine.answers(PROMPTS)]))
"""


def test_without_a_method_every_log_probability_is_that_of_vllm_without_the_plugin():
    done = subprocess.run(
        [sys.executable, "-c", PLAIN],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_PLUGINS": "none"},
        timeout=900,
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("ANSWERS ")), None)
    assert line is not None, done.stderr[-2000:]
    mine = [[a.tokens, a.logs] for a in Vllm(None).answers(PROMPTS)]
    assert mine == json.loads(line.removeprefix("ANSWERS "))


@pytest.mark.parametrize(
    "spec, options, words",
    [
        ("nothing", {}, "there is no method"),
        ("pai:alpha=-1", {}, "at least 0"),
        ("sparsevlm", {}, "sparsevlm cannot be served by vLLM: it drops tokens inside the language model"),
        ("shield:alpha=0", {}, "it sends other images through the vision tower"),
        ("owl", {}, "what the first branch saw"),
        ("cdpruner", {}, "it chooses image tokens by the question"),
        ("prumerge", {}, "it reads layer 6 of the vision tower, of which vLLM has the first 5"),
        ("memvr", {"enable_chunked_prefill": True}, "enable_chunked_prefill=True"),
        ("var", {"enable_prefix_caching": True}, "enable_prefix_caching=True"),
        ("vcd+hiprune", {}, "Serve one of them"),
        ("iri:lambda_a=0.1+iri", {}, "listed twice"),
        ("hgai", {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, "tensor parallelism"),
        ("pai", {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline parallelism"),
        ("pai", {"kv_cache_dtype": "fp8"}, "quantised KV cache"),
    ],
)
def test_what_cannot_be_served_is_refused_when_the_server_starts(spec, options, words):
    with pytest.raises((VlmFixError, RuntimeError, NotImplementedError), match=words):
        Vllm(spec, **options)


@pytest.mark.parametrize("value", [["pai", 3], {"method": "pai", "strength": 1}, 7, "pai,vcd", [], ""])
def test_settings_that_cannot_be_read(value):
    with pytest.raises(VlmFixError, match="give one stack"):
        Settings.read({"vlm_fix": value})


def test_a_misspelt_key_is_an_error():
    with pytest.raises(VlmFixError, match="write 'vlm_fix'"):
        Settings.read({"vlm-fix": "pai"})


def test_a_cache_of_unknown_layout_is_refused(engine):
    """Written by the backend's kernel and read back: a layout that reads something else is not taken."""
    layer = next(iter(engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()))

    class Other:
        """Writes keys in another order."""

        num_kv_heads, head_size = layer.impl.num_kv_heads, layer.impl.head_size

        def do_kv_cache_update(self, at, keys, values, cache, slots):
            layer.impl.do_kv_cache_update(at, keys.flip(-1), values, cache, slots)

    class Layer:
        impl, kv_cache, attn_backend = Other(), layer.kv_cache, layer.attn_backend

        def __getattr__(self, name):
            return getattr(layer, name)

    assert layout_of(layer).__name__ == "packed_for_cpu"
    before = layer.kv_cache[1:3].clone()
    with pytest.raises(VlmFixError, match="CPU_ATTN"):
        layout_of(Layer())
    assert torch.equal(layer.kv_cache[1:3], before)


def test_second_branches_have_their_room_in_the_memory_plan(engine, cached):
    """vcd's branches take about as much as the requests themselves, and a quarter more while they grow."""
    whole, left = (e.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks for e in (cached, engine))
    assert left == pytest.approx(whole / 2.25, rel=0.01)
