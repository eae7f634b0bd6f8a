"""`bench peers`: the peers written here compute what our methods compute; what is not installed is told."""

from __future__ import annotations

import json

import pytest
import torch

from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.bench import peers
from vlm_fix.eval.bench.models import SHAPES, build


@pytest.fixture(scope="module")
def built():
    model, inputs = build(SHAPES["tiny"], torch.device("cpu"), torch.float64)
    for layer in model.model.language_model.layers:  # scores large enough for an edit to show
        layer.self_attn.q_proj.weight.data *= 20
        layer.self_attn.k_proj.weight.data *= 20
    return model, inputs


@pytest.mark.parametrize("spec, peer", [("pai", "eager-pai"), ("vaf", "eager-vaf")])
def test_the_eager_formula_is_our_edit(built, spec, peer):
    model, inputs = built
    logits = []
    for side in (peers.ours(model, inputs, ""), peers.ours(model, inputs, spec), peers.peer(model, inputs, peer)):
        with side:
            out = model.generate(
                **inputs, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            logits.append(torch.stack(out.logits))
    plain, own, theirs = logits
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    assert (own - plain).abs().max() > 100 * (own - theirs).abs().max()
    assert model.config.get_text_config()._attn_implementation == "sdpa", "as it was"


def test_hf_cfg_is_the_guidance_of_pai(built):
    model, inputs = built
    made = []
    for side in (peers.ours(model, inputs, "pai:alpha=0,gamma=1.1,beta=0"), peers.peer(model, inputs, "hf-cfg")):
        with side as run:
            made.append(run(6))
    assert torch.equal(*made)


def test_rows_and_what_is_missing(monkeypatch, capsys, tmp_path):
    find = peers.importlib.util.find_spec
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "kvpress" else find(name))
    out = tmp_path / "peers.json"
    command = f"bench peers --shape tiny --method hf-cfg,knorm --new-tokens 2 --rounds 1 --device cpu --output {out}"
    assert cli.main(command.split()) == 0
    assert "kvpress is not installed here" in " ".join(capsys.readouterr().out.split())
    cfg, knorm = json.loads(out.read_text())["rows"]
    assert cfg["ours_first_token"][0] > 0 and cfg["theirs_each_token"][0] > 0 and not cfg["note"]
    assert knorm["note"] and "ours_first_token" not in knorm
    with pytest.raises(VlmFixError, match="has no peer here"):
        peers.run(["act"], "tiny")
    with pytest.raises(VlmFixError, match="does not go with bench peers"):
        peers.run([], "tiny-qwen")
