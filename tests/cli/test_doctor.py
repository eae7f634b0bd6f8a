"""`vlm-fix doctor`: it passes on this installation, and fails where methods are kept from acting."""

from __future__ import annotations

import json
import sys
from argparse import Namespace

import pytest
import torch
from transformers import AttentionInterface, LogitsProcessorList
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import vlm_fix
from vlm_fix.cli import doctor, main


def checks(capsys, command=("doctor", "--json")):
    """Exit code, and {kind: check} of the printed JSON."""
    code = main(list(command))
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] == (code == 0)
    return code, {check["kind"]: check for check in printed["checks"]}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(doctor, "TOKENS", 4)


def test_doctor_passes_on_this_installation(capsys):
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert "All kinds of method work here." in out and "transformers" in out and "FAILED" not in out
    assert max(map(len, out.splitlines())) <= 100
    count = len(doctor.PROBES)
    assert f"{count}/{count} " in err, "progress is shown"
    for probe in doctor.PROBES:
        assert probe.kind in out


def test_attention_that_edits_nothing_is_reported(capsys, monkeypatch):
    """As if transformers no longer called the registered attention function."""
    monkeypatch.setattr(AttentionInterface, "get_interface", lambda self, name, default: sdpa_attention_forward)
    code, found = checks(capsys)
    assert code == 1
    for kind in ("attention", "heads"):
        assert not found[kind]["ok"] and not found[kind]["changed"]
        assert found[kind]["neutral"] and found[kind]["unwrapped"]
    assert found["contrast"]["ok"] and found["pruning before the LM"]["ok"], "the others are judged on their own"


def test_logits_processors_that_are_not_called_are_reported(capsys, monkeypatch):
    monkeypatch.setattr(LogitsProcessorList, "__call__", lambda self, ids, scores, **kwargs: scores)
    code, found = checks(capsys)
    assert code == 1
    assert not found["contrast"]["changed"] and not found["logits"]["changed"] and found["attention"]["ok"]


def test_a_model_that_unwrap_does_not_restore_is_reported(capsys, monkeypatch):
    """A bias that stays on the model after unwrap."""
    wrapped = vlm_fix.wrapped

    def leaking(model, spec):
        with torch.no_grad():
            model.lm_head.weight[0] += 1e-3
        return wrapped(model, spec)

    monkeypatch.setattr(vlm_fix, "wrapped", leaking, raising=False)
    code, found = checks(capsys)
    assert code == 1 and not any(check["unwrapped"] or check["neutral"] for check in found.values())


def test_a_crash_is_one_line_and_the_others_go_on(capsys, monkeypatch):
    broken = doctor.Probe("attention", "pai:alpha=1", "pai:alpha=0")
    monkeypatch.setattr(doctor, "PROBES", (broken, *doctor.PROBES[3:4]))
    real = doctor._answer
    calls = []

    def answer(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:  # the first is the plain model's
            raise RuntimeError("no kernel for this device")
        return real(*args, **kwargs)

    monkeypatch.setattr(doctor, "_answer", answer)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "pai: RuntimeError: no kernel for this device" in out and "1 of 2 kinds failed (attention)" in out


def test_what_another_model_refuses_is_no_failure():
    model, inputs = doctor._load(Namespace(model="picto-llava", dtype="auto", device="auto"))
    model.config.model_type = "florence2"
    found = list(doctor.examine(model, inputs, must_run=False, tokens=1))
    assert all(f.ok and "not supported" in f.refused and f.changed is None for f in found)
    assert not any(f.ok for f in doctor.examine(model, inputs, must_run=True, tokens=1))


def test_missing_eval_extra_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vlm_fix.eval.picto", None)
    assert main(["doctor"]) == 2
    out, err = capsys.readouterr()
    assert "transformers" in out and err.strip().splitlines()[-1].startswith("error: doctor runs on the bundled model")
    assert "pip install 'vlm-fix[eval]'" in err and "Traceback" not in err
