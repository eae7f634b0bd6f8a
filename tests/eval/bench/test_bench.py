"""The bench program: what it counts is right; what it times is only there and positive (timings are not tested)."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from vlm_fix import cli
from vlm_fix.eval import bench
from vlm_fix.eval.bench.clock import Timing
from vlm_fix.eval.bench.measuring import _fastest

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The two small shapes, made tiny."""
    clip = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    qwen = {"depth": 4, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "fullatt_block_indexes": [1, 3]}
    sizes = {"side": 6, "before": 5, "after": 6}
    monkeypatch.setitem(
        bench.SHAPES, "small", bench.Shape("llava", {**clip, "patch_size": 4, "projection_dim": 16}, TEXT, **sizes)
    )
    monkeypatch.setitem(
        bench.SHAPES, "small-qwen", bench.Shape("qwen2_5_vl", qwen, {**TEXT, "rope_parameters": rope}, **sizes)
    )


def test_peak_memory_counts_what_is_held_at_once():
    def run():
        x = torch.ones(1_000_000)  # 4 MB
        del x
        y = torch.ones(2_000_000)  # 8 MB, after the first is gone
        return y + 1  # 8 MB more beside it

    assert bench.peak_mb(run, torch.device("cpu")) == pytest.approx(16, rel=0.01)


def test_the_fastest_of_all_rounds_leave_out_what_was_disturbed():
    disturbed = Timing(9.0, 1.0, [5.0] * 10)
    quiet = Timing(3.0, 1.0, [float(i) for i in range(1, 11)])
    assert _fastest([disturbed, quiet]) == (3.0, 3.0)  # two of the twenty steps beat it
    slow = Timing(2.0, 0.25, [4.0])  # a loop that is not token by token
    assert _fastest([slow, slow]) == (2.0, 4.0)


@pytest.mark.parametrize("shape", ["small", "small-qwen"])
def test_pruning_figures(shape):
    specs = ["hiprune", "random_tokens", "fastv", "knorm", "a_vl:core=0.1,text_start=3", "hiprune+pai"]
    got = bench.run("prune", shape, specs, new_tokens=3, rounds=1, keep=(9,))
    base, hiprune, control, fastv, knorm, a_vl, stack = got["rows"]
    assert stack["spec"] == "hiprune:keep=9+pai" and stack["kept"] == 9 and stack["scoring"] is None
    assert fastv["scoring"] is None and knorm["scoring"] == pytest.approx(knorm["seconds"] - base["seconds"])
    assert 9 < fastv["kept"] < 36 and knorm["kept"] == 9
    assert (got["visual_tokens"], got["prompt_tokens"]) == (36, 47)
    assert (base["kept"], hiprune["kept"], control["kept"]) == (36, 9, 9)
    per_column = 3 * 2 * 2 * 8 * 4 / 1e6  # layers, keys and values, heads, head size, bytes
    assert base["kv_mb"] == pytest.approx(47 * per_column) and hiprune["kv_mb"] == pytest.approx(20 * per_column)
    assert a_vl["kept"] == 9 and a_vl["kv_mb"] == pytest.approx(17 * per_column), "laid aside is stored, evicted is not"
    assert control["scoring"] == 0 and hiprune["scoring"] == pytest.approx(hiprune["seconds"] - control["seconds"])
    assert all(row["speed"] > 0 and row["peak_mb"] > 0 for row in got["rows"])


def test_eager_forms_all_weights():
    shape = dataclasses.replace(bench.SHAPES["small"], after=400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.SHAPES, "small", shape)
        specs = ["pai", "pai @ eager", "zerotuning", "zerotuning @ eager"]
        got = bench.run("attention", "small", specs, new_tokens=2, rounds=1)
    memory = [row["memory"] for row in got["rows"]]
    assert memory[1] < 1.05 and memory[2] > 1.5 and memory[4] - memory[3] > 0.4, memory
    from vlm_fix.attention import function, inputs

    assert {m.sdpa_attention_forward.__name__ for m in (function, inputs)} == {"sdpa_attention_forward"}


def test_decode_beside_hf_cfg(capsys, tmp_path):
    command = ["bench", "decode", "--method", "vcd", "--new-tokens", "2", "--rounds", "1", "--seed", "1"]
    assert cli.main([*command, "--output", str(tmp_path / "out" / "decode.json")]) == 0
    out = capsys.readouterr().out
    assert "vcd" in out and "tokens/s" in out
    saved = json.loads((tmp_path / "out" / "decode.json").read_text())
    assert saved["seed"] == 1 and saved["versions"]["torch"] == torch.__version__
    rows = bench.run("decode", new_tokens=2, rounds=1, methods=["hf-cfg"])["rows"]
    assert rows[1]["speed"] > 0 and not rows[1]["note"]


def test_what_cannot_run_gets_a_note(capsys):
    rows = bench.run("attention", "small", ["vhr:layers=9", "pai"], new_tokens=2, rounds=1)["rows"]
    assert "does not fit this model" in rows[1]["note"] and rows[1]["speed"] == 0
    assert rows[2]["speed"] > 0
    assert cli.main(["bench", "attention", "--shape", "huge"]) == 2
    assert "huge" in capsys.readouterr().err
    assert cli.main(["bench", "prune", "--keep", "many"]) == 2
    assert "many" in capsys.readouterr().err


def test_every_method_of_a_kind_is_listed():
    kinds = {kind: bench.methods_of(kind) for kind in bench.KINDS}
    assert "pai" in kinds["attention"] and "vcd" in kinds["decode"] and "hiprune" in kinds["prune"]
    assert any(spec.startswith("sid") for spec in kinds["decode"]), "a contrast that uses an edit"
    from vlm_fix import list_methods

    names = {spec.partition(":")[0] for specs in kinds.values() for spec in specs}
    of_files = {m.name for m in list_methods() if "file" in {field.name for field in dataclasses.fields(m)}}
    assert {m.name for m in list_methods()} - names == {"baseline", *of_files} and of_files
