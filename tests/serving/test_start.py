"""What vLLM is without a method, and what a server refuses to start with."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from tests.serving.support import CAPTION, PATH, Case, Vllm, cases
from vlm_fix import cli
from vlm_fix.cli import serve
from vlm_fix.errors import VlmFixError
from vlm_fix.serving import memory
from vlm_fix.serving.options import check, variant
from vlm_fix.serving.paged import layout_of
from vlm_fix.serving.plugin import planned
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
        ("icd+vista", {}, "vista would read the second branch's prompt"),
        ("hiprune:keep=9999", {}, "keep=9999 covers every one of an image's 64 tokens"),
        ("iri:lambda_a=0.1+iri", {}, "listed twice"),
        ("hgai", {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, "tensor parallelism"),
        ("pai", {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline parallelism"),
        ("pai", {"kv_cache_dtype": "fp8"}, "quantised KV cache"),
    ],
)
def test_what_cannot_be_served_is_refused_when_the_server_starts(spec, options, words):
    with pytest.raises((VlmFixError, RuntimeError, NotImplementedError), match=words):
        Vllm(spec, **options)


@pytest.mark.parametrize(
    "value", [["pai", 3], {"method": "pai", "strength": 1}, 7, {"method": ["pai"], "x": 1}, [], ""]
)
def test_settings_that_cannot_be_read(value):
    with pytest.raises(VlmFixError, match="give one stack"):
        Settings.read({"vlm_fix": value})


def test_several_runs_are_shown_as_the_stack_that_was_meant():
    with pytest.raises(VlmFixError, match=r"write 'pai:alpha=0.3\+vcd'\."):
        Settings.read({"vlm_fix": "pai:alpha=0.3,vcd"})


@pytest.mark.parametrize(
    "spec, options, words",
    [
        ("vhr", "--tensor-parallel-size 2", "vhr compares heads with each other or names them"),
        ("vhr", "-tp=2", "vhr compares heads with each other or names them"),
        ("pai", "--pipeline-parallel-size 2", "pai cannot be served with pipeline parallelism; leave it out."),
        ("pai", "--pipeline_parallel_size=2", "pai cannot be served with pipeline parallelism; leave it out."),
        ("pai", "--enable-lora", "pai cannot be served with LoRA; leave it out."),
        ("pai+vcd", "--kv-cache-dtype fp8", "pai, vcd cannot be served with a quantised KV cache; leave it out."),
        ("pai", "--speculative-config {}", "pai cannot be served with speculative decoding; leave it out."),
        ("hiprune:keep=9999", "", "covers every one of an image's 64 tokens"),
        ("pai,vcd", "", "write 'pai+vcd'"),
    ],
)
def test_what_can_be_known_without_the_model_ends_the_command(capsys, monkeypatch, spec, options, words):
    monkeypatch.setattr(serve, "_serve", lambda path, rest: pytest.fail("vLLM was started"))
    assert cli.main(["serve", "picto-llava", "--method", spec, "--port", "1", *options.split()]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in said


@pytest.mark.parametrize(
    "spec, options",
    [
        ("pai", "--tensor-parallel-size 1 --pipeline-parallel-size=1 --kv-cache-dtype auto --dtype float32"),
        ("pai", "--tensor-parallel-size 2"),
        ("hiprune:keep=63", ""),
        ("baseline", "--enable-lora"),
    ],
)
def test_other_options_go_to_vllm_as_they_are(monkeypatch, spec, options):
    started = []
    monkeypatch.setattr(serve, "_serve", lambda path, rest: started.append(rest))
    assert cli.main(["serve", "picto-llava", "--method", spec, *options.split(), "--port", "0"]) == 0
    assert [words[: len(options.split())] for words in started] == [options.split()]


def test_a_port_that_is_in_use_is_told_before_vllm_starts(capsys, monkeypatch):
    monkeypatch.setattr(serve, "_serve", lambda path, rest: pytest.fail("vLLM was started"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert cli.main(["serve", "picto-llava", "--host", "127.0.0.1", "--port", port]) == 2
    assert f"port {port} of 127.0.0.1 cannot be used" in capsys.readouterr().err
    assert cli.main(["serve", "picto-llava", "--port", "70000"]) == 2
    assert "choose another --port" in capsys.readouterr().err


@pytest.mark.parametrize("options", ["", "--gpu-memory-utilization 0.3", "--gpu_memory_utilization=0.3"])
def test_vllm_takes_the_memory_that_is_free(capsys, monkeypatch, options):
    started = []
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(serve, "_serve", lambda path, rest: started.append(rest))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12, total=24))
    assert cli.main(["serve", "picto-llava", "--port", "0", *options.split()]) == 0
    ours = "--gpu-memory-utilization 0.45" in " ".join(started[0])
    assert ours == (not options) == ("vLLM may take 45% of this machine's memory" in capsys.readouterr().err)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=23, total=24))
    assert memory.share() is None


def test_an_engine_that_cannot_start_ends_the_evaluation_at_once(tmp_path, capsys, monkeypatch):
    begun = []

    def start(*args, **kwargs):
        begun.append(args)
        raise RuntimeError("no memory for this\nand more")

    monkeypatch.setattr("vllm.LLM", start)
    command = "eval pope --engine vllm --method pai --limit 3 --batch-size 1 --split random --output"
    assert cli.main([*command.split(), str(tmp_path / "run")]) == 2 and len(begun) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "vLLM could not start (no memory for this)" in said and "go on with --resume" in said


@pytest.mark.parametrize("name, near", [("picto_llava", "did you mean 'picto-llava'?"), ("./none", "a folder")])
def test_a_mistyped_model_is_one_sentence(capsys, name, near):
    assert cli.main(["serve", name, "--method", "pai"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: model {name!r} could not be loaded (") and near in said
    assert said.endswith("a Hugging Face name that this machine can download, or picto-llava or picto-smol.")


@pytest.mark.parametrize(
    "spec, words, example",
    [
        ("pai:alpha=0.3", 'give "off", or settings such as', '{"pai": {"alpha": 0.3}}'),
        ("hiprune:keep=16+vaf:enhance=1.5", "give settings such as", '{"vaf": {"enhance": 1.5}}'),
        ("iri+vcd", 'give "off", or settings such as', '{"iri": {"lambda_a": 0.5}}'),
    ],
)
def test_the_settings_that_are_named_are_taken(spec, words, example):
    engine = planned(Settings(tuple(spec.split("+"))), PATH, None, False)
    for asked in (7, "nonsense"):
        with pytest.raises(VlmFixError) as caught:
            variant(asked, engine)
        assert str(caught.value) == f"vlm_fix is {asked!r}: {words} {example}."
    variant(json.loads(example), engine)


def test_where_nothing_can_change_a_request_is_told_to_leave_it_out():
    with pytest.raises(VlmFixError, match="leave it out, hiprune is for all requests"):
        variant(7, planned(Settings(("hiprune:keep=16",)), PATH, None, False))


@pytest.mark.parametrize(
    "spec, asked, words",
    [
        ("pai", {"pai": None}, "pai is None: give"),
        ("pai", {"pai": ""}, "pai is '': give"),
        ("pai", {"pai": {}}, "pai is {}: give"),
        ("pai", {"pai": 0}, "pai is 0: give"),
        ("pai", {"alpha": 10**400}, "which is no number"),
        ("hiprune:keep=16+pai", {"hiprune": False}, "cannot change for one"),
        ("hiprune:keep=16+pai", {"hiprune": {}}, "cannot change for one"),
        ("opera:weight=0+pai", {"opera": {"weight": 0.5}}, "opera cannot be served by vLLM"),
        ("fastv:keep=1+pai", {"fastv": {"keep": 0.5}}, "(fastv cannot be served by vLLM|cannot change for one)"),
    ],
)
def test_what_a_request_cannot_have_is_told(spec, asked, words):
    engine = planned(Settings(tuple(spec.split("+"))), PATH, None, False)
    with pytest.raises(VlmFixError, match=words):
        check(asked, engine)


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
