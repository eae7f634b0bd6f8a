"""Calibration: the file, what wrap takes from it, and what `calibrate` finds."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_inputs, single

import vlm_fix
from vlm_fix import cli
from vlm_fix.calibration import Calibration, Sample, answer_scores, sizes
from vlm_fix.families import arch_of


def labelled(family, images=(1, 2, 1), seed=0, **kw):
    """One Sample a row of make_inputs."""
    return [Sample(single(family, list(images), row, seed, **kw), 5 + row, 9 + row) for row in range(len(images))]


def written(path, model, method="zerotuning", **found):
    Calibration(method, found, {"name": "tiny", **sizes(arch_of(model))}).write(path)
    return path


def test_answer_scores_are_those_of_single_prompts(family, model):
    samples = labelled(family)
    together = answer_scores(model, samples)
    for i, s in enumerate(samples):
        with torch.no_grad():
            alone = model(**s.inputs).logits[0, -1]
        assert torch.allclose(together[i], alone[[s.target, s.other]], atol=1e-5)
    with vlm_fix.wrapped(model, "vcd:beta=0.5"):  # a contrast acts in generate, so its scores must show here
        assert not torch.allclose(answer_scores(model, samples), together, atol=1e-3)


def test_calibrated_values_fill_what_is_left_at_default(family, model, tmp_path):
    file = written(tmp_path / "z.json", model, rate=0.3, head_indices=[0, 2])
    vlm_fix.wrap(model, ["zerotuning", "vhr"], calibration=file)
    (method,) = (m for m in model.__dict__["_vlm_fix_engine"].active if m.name == "zerotuning")
    assert (method.rate, method.head_indices) == (0.3, (0, 2))
    vlm_fix.unwrap(model)
    with vlm_fix.wrapped(model, "zerotuning:rate=0.8", calibration=[file]):
        assert model.__dict__["_vlm_fix_engine"].active[0].rate == 0.8
        assert model.__dict__["_vlm_fix_engine"].active[0].head_indices == (0, 2)
        calibrated = model.generate(**make_inputs(family, [1]), max_new_tokens=4, output_logits=True, **PLAIN).logits
    with vlm_fix.wrapped(model, "zerotuning:rate=0.8,head_indices=0|2"):
        spelled = model.generate(**make_inputs(family, [1]), max_new_tokens=4, output_logits=True, **PLAIN).logits
    assert all(torch.equal(a, b) for a, b in zip(calibrated, spelled, strict=True))


PLAIN = {"do_sample": False, "return_dict_in_generate": True}


def test_file_comes_back_as_it_was(models, tmp_path):
    c = Calibration("pai", {"alpha": 0.5}, {"name": "m"}, "command", 3, {"a": 1}, {"after": 0.5}, {"torch": "2"}, "now")
    c.write(tmp_path / "new" / "c.json")
    assert Calibration.read(tmp_path / "new" / "c.json") == c
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "cannot be read; make it with `vlm-fix calibrate"),
        ("{", "no JSON"),
        ("[]", "needs method, found and model"),
        ('{"method": "pai", "found": {}}', "needs method, found and model"),
        ('{"method": "pai", "found": 3, "model": {}}', "needs method, found and model"),
        ('{"method": "pai", "found": {}, "model": {}, "alpha": 3}', "needs method, found and model"),
    ],
)
def test_bad_files(models, tmp_path, content, sentence):
    file = tmp_path / "c.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(vlm_fix.VlmFixError, match=sentence):
        vlm_fix.wrap(models["llava"], "pai", calibration=file)
    assert "_vlm_fix_engine" not in models["llava"].__dict__


def test_files_that_do_not_fit(models, tmp_path):
    model, file = models["llava"], written(tmp_path / "z.json", models["llava"], rate=0.3)

    def refused(spec, calibration, sentence):
        with pytest.raises(vlm_fix.VlmFixError, match=sentence):
            vlm_fix.wrap(model, spec, calibration=calibration)

    refused("pai", file, "calibration of zerotuning fits none of pai; leave the file out or add zerotuning")
    refused("zerotuning", [file, file], "two calibration files of zerotuning")
    refused("zerotuning", written(tmp_path / "a.json", model, speed=1), "holds speed, which zerotuning does not take")
    refused("zerotuning", written(tmp_path / "b.json", model, rate=-1), "must be a number at least")
    refused(
        "zerotuning", written(tmp_path / "c.json", models["qwen2_5_vl"], rate=0.3), "type qwen2_5_vl, but this model"
    )
    content = json.loads(file.read_text())
    content["model"]["depth"] = 32
    file.write_text(json.dumps(content))
    refused("zerotuning", file, "with depth 32, but this model has depth 4; run `vlm-fix calibrate zerotuning`")


def test_a_method_without_anything_to_find_says_so(models):
    with pytest.raises(vlm_fix.VlmFixError, match="vcd has nothing to find; search a strength with --search"):
        vlm_fix.parse_spec("vcd").calibrate(models["llava"], labelled("llava"), 0, lambda *_: None)


def test_checkpoint_may_carry_calibrations(models, tmp_path, monkeypatch):
    model = models["llava"]
    monkeypatch.setattr(model, "name_or_path", str(tmp_path), raising=False)
    file = written(tmp_path / "calibration" / "zerotuning.json", model, rate=0.3)
    with vlm_fix.wrapped(model, "zerotuning"):
        assert model.__dict__["_vlm_fix_engine"].active[0].rate == 0.3
    with vlm_fix.wrapped(model, "zerotuning", calibration=written(tmp_path / "other.json", model, rate=0.4)):
        assert model.__dict__["_vlm_fix_engine"].active[0].rate == 0.4
    file.write_text("{")
    with pytest.raises(vlm_fix.VlmFixError, match="no JSON"):
        vlm_fix.wrap(model, "zerotuning")
    with vlm_fix.wrapped(model, "pai"):  # the file of a method that is not asked for is not even read
        pass


# ---- the command, on Picto ----------------------------------------------------------------------------------------------


def test_calibrate_and_evaluate(tmp_path, capsys):
    out = tmp_path / "iri.json"
    command = ["calibrate", "iri", "--limit", "12", "--seed", "4", "--search", "lambda_a=0.1|0.9", "--out", str(out)]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "lambda_a=0.1 " in text and "iri: rr_attention = " in text and "held-out accuracy" in text
    made = Calibration.read(out)
    assert (
        made.method == "iri" and made.command.startswith("vlm-fix calibrate iri --model picto-llava") and made.seed == 4
    )
    assert made.found["lambda_a"] in (0.1, 0.9) and len(made.found["rr_attention"]) == len(made.found["rr_mlp"]) == 6
    assert made.data["questions"] == [12, 12] and made.score["questions"] == 12 and made.model["depth"] == 6
    assert made.model["weights"].startswith("sha256:") and set(made.versions) >= {"torch", "transformers", "vlm_fix"}
    assert cli.main([*command[:-1], str(tmp_path / "again.json"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["found"] == made.found and again["score"] == made.score, "the same seed finds the same"
    command = ["eval", "pope", "--method", "iri", "--limit", "2", "--split", "random", "--json"]
    assert cli.main([*command, "--calibration", str(out), "--output", str(tmp_path / "run")]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["settings"]["calibration"]["iri"]["rr_mlp"] == made.found["rr_mlp"]


def test_halves_have_no_image_in_common_and_right_answers_come_first():
    from vlm_fix.eval import calibrate as module
    from vlm_fix.eval import runner

    model, processor, _ = runner.load_model("picto-llava")
    task = module._questions("picto:train", 20, 1)
    first, second, yes = module._samples(model, processor, task, 20, 1, None, lambda *_: None)
    assert len(first) == len(second) == 20
    pixels = [{float(s.inputs["pixel_values"].double().sum()) for s in half} for half in (first, second)]
    assert not pixels[0] & pixels[1]
    assert processor.tokenizer.decode([yes]).strip().lower() == "yes"
    assert {s.target for s in first} == {yes, first[0].other if first[0].target == yes else first[0].target}
    assert processor.tokenizer.decode([first[0].vocabulary["dog"]]).strip() == "dog"
    assert float((answer_scores(model, first)[:, 0] > answer_scores(model, first)[:, 1]).float().mean()) > 0.5


@pytest.mark.parametrize(
    "command, sentence",
    [
        ("calibrate vdc", "did you mean 'vcd'"),
        ("calibrate vcd", "vcd has nothing to find; search a strength with --search"),
        ("calibrate vcd --search alpha", "is not of the form name=value|value"),
        ("calibrate vcd --search alpah=1", "did you mean 'alpha'"),
        ("calibrate vcd --search alpha=-1", "must be a number"),
        ("calibrate iri --limit 1", "give at least 2 questions"),
        ("calibrate iri --data picto:moon", "moon"),
        ("eval pope --method vcd --limit 2 --calibration none.json --output {dir}", "none.json cannot be read"),
    ],
)
def test_user_errors(command, sentence, capsys, tmp_path):
    assert cli.main(command.format(dir=tmp_path / "out").split()) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
