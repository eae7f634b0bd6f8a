"""Calibration: the file, what wrap takes from it, and what `calibrate` finds."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

import vlm_fix
from tests.support.labelled import labelled
from tests.support.models import BUILD, make_inputs
from tests.support.references import base as ref
from vlm_fix import cli
from vlm_fix.calibrated import Calibration, sizes, weights_id
from vlm_fix.calibration.search import answer_scores
from vlm_fix.families import arch_of
from vlm_fix.sample import Sample
from vlm_fix.wing import engine_of


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
    (method,) = (m for m in engine_of(model).active if m.name == "zerotuning")
    assert (method.rate, method.head_indices) == (0.3, (0, 2))
    vlm_fix.unwrap(model)
    with vlm_fix.wrapped(model, "zerotuning:rate=0.8", calibration=[file]):
        assert engine_of(model).active[0].rate == 0.8
        assert engine_of(model).active[0].head_indices == (0, 2)
        calibrated = model.generate(**make_inputs(family, [1]), max_new_tokens=4, output_logits=True, **PLAIN).logits
    with vlm_fix.wrapped(model, "zerotuning:rate=0.8,head_indices=0|2"):
        spelled = model.generate(**make_inputs(family, [1]), max_new_tokens=4, output_logits=True, **PLAIN).logits
    assert all(torch.equal(a, b) for a, b in zip(calibrated, spelled, strict=True))


PLAIN = {"do_sample": False, "return_dict_in_generate": True}


def test_what_is_given_wins_even_at_its_default(models):
    from vlm_fix.methods.attention.zerotuning import ZeroTuning

    made = Calibration("zerotuning", {"rate": 3.0, "head_indices": [0], "layers": "1-"}, {})
    assert made.fill(vlm_fix.parse_spec("zerotuning:rate=0.6")).rate == 0.6
    assert made.fill(ZeroTuning(rate=0.6)).rate == 0.6 and made.fill(ZeroTuning(None, "both", 0.6)).rate == 0.6
    left = made.fill(vlm_fix.parse_spec("zerotuning:rate=0.6,head_indices=auto"))
    assert (left.rate, left.head_indices, left.layers) == (0.6, (0,), "1-")
    assert made.fill(ZeroTuning()) == ZeroTuning(rate=3.0, head_indices=(0,), layers="1-")
    assert made.fill(ZeroTuning().but(head_indices=(2,))) == ZeroTuning(rate=3.0, head_indices=(2,), layers="1-")
    assert made.fill(replace(ZeroTuning(), head_indices=(2,))).rate == 0.6, "replace gives every field"
    assert copy.deepcopy(ZeroTuning(rate=0.6)).given == {"rate"} and ZeroTuning(rate=0.6) == ZeroTuning()
    assert hash(ZeroTuning(rate=0.6)) == hash(ZeroTuning())


def test_a_file_that_fills_nothing_is_warned_of(models, tmp_path):
    file = written(tmp_path / "z.json", models["llava"], rate=0.3)
    with (
        pytest.warns(UserWarning, match="the calibration of zerotuning fills nothing: all of it .rate. is given"),
        vlm_fix.wrapped(models["llava"], "zerotuning:rate=0.6", calibration=file),
    ):
        pass


def test_a_seed_leaves_the_rest_to_the_calibration(models):
    from vlm_fix.eval.run.plan import _seeded

    method = _seeded(vlm_fix.parse_spec("random_heads:alpha=3"), 3)
    assert method.seed == 3 and method.given == {"alpha", "seed"}


def test_other_weights_are_warned_of(models, tmp_path, monkeypatch):
    """By the sha256 over a folder's files, by the hub's revision; nothing where one of them is unknown."""
    model, found = models["llava"], {"rate": 0.3}

    def made(weights):
        return Calibration("zerotuning", found, {"name": "twin", "weights": weights, **sizes(arch_of(model))})

    def warned(weights):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with vlm_fix.wrapped(model, "zerotuning", calibration=made(weights)):
                pass
        return [str(w.message) for w in caught]

    monkeypatch.setattr(model, "name_or_path", "", raising=False)
    assert not warned("revision:abc") and not warned("sha256:abc")
    monkeypatch.setattr(model.config, "_commit_hash", "abc", raising=False)
    assert not warned("revision:abc") and not warned("revision:unknown") and not warned("sha256:abc")
    assert (
        "made on other weights (twin, revision:abd) than this model's (revision:abc): run" in warned("revision:abd")[0]
    )
    monkeypatch.setattr(model, "name_or_path", str(tmp_path), raising=False)
    (tmp_path / "model.safetensors").write_bytes(b"first")
    mine = "sha256:" + hashlib.sha256(hashlib.sha256(b"first").digest()).hexdigest()
    assert not warned(mine) and not warned("revision:abd")
    (tmp_path / "model.safetensors").write_bytes(b"second")
    assert mine[:20] in warned(mine)[0]


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
def test_file_that_is_no_calibration_is_one_sentence(models, tmp_path, content, sentence):
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
        assert engine_of(model).active[0].rate == 0.3
    with vlm_fix.wrapped(model, "zerotuning", calibration=written(tmp_path / "other.json", model, rate=0.4)):
        assert engine_of(model).active[0].rate == 0.4
    file.write_text("{")
    with pytest.raises(vlm_fix.VlmFixError, match="no JSON"):
        vlm_fix.wrap(model, "zerotuning")
    with vlm_fix.wrapped(model, "pai"):  # the file of a method that is not asked for is not even read
        pass


# ---- what methods find --------------------------------------------------------------------------------------------------


def quiet(*_):
    pass


def sureness_by_hand(twin, samples, run):
    """Mean of log p(right) - log(p(right) + p(wrong)); run(sample) -> the Reference of one float64 pass."""
    total = 0.0
    for s in samples:
        logits = ref.teacher_forced(twin, run(s), s.inputs, s.inputs["input_ids"][0, :0])[0]
        right, wrong = float(logits[s.target].exp()), float(logits[s.other].exp())
        total += math.log(right / (right + wrong)) / len(samples)
    return total


@dataclass
class FirstToken(ref.Reference):
    rate: float = 1.0
    heads: tuple = ()
    rows: str = "all"

    def score(self, z, layer, head, row):
        z = z.clone()
        z[0] += math.log(self.rate) if head in self.heads else 0.0
        return z


def test_zerotuning_finds_what_a_reference_finds(family, model):
    samples, twin = labelled(family, (1, 2, 1)), ref.double(model)

    def gain(rate, heads):
        def run(s):
            visual = ref.visual_columns(s.inputs["input_ids"])
            return FirstToken(visual, s.inputs["input_ids"].shape[1], [1, 2, 3], rate=rate, heads=heads)

        return sureness_by_hand(twin, samples, run) - plain

    plain = sureness_by_hand(twin, samples, lambda s: None)
    alone = {rate: {h: gain(rate, (h,)) for h in range(4)} for rate in (1.5, 0.6)}
    assert min(abs(g) for gains in alone.values() for g in gains.values()) > 1e-6, (
        "pick another seed: a head is neutral"
    )
    groups = {rate: tuple(h for h, g in gains.items() if g > 0) for rate, gains in alone.items()}
    side = max(groups, key=lambda r: (len(groups[r]), sum(alone[r][h] for h in groups[r])))
    rates = (1.2, 1.5, 2.0, 3.0, 5.0) if side == 1.5 else (0.8, 0.6, 0.4, 0.2, 0.1)
    best = max(rates, key=lambda r: gain(r, groups[side]))
    found = vlm_fix.parse_spec("zerotuning:layers=1-3").calibrate(model, samples, 0, quiet)
    assert found == {"rate": best, "head_indices": groups[side]}


@dataclass
class Silenced(ref.Reference):
    head: int = 0

    def scale(self, out, layer):
        out = out.clone()
        out[self.head, -1] = 0
        return out


def test_ad_hh_finds_what_a_reference_finds(family, model):
    twin, samples = ref.double(model), labelled(family, (1, 2, 1, 1))

    def log_p(s, run):
        return ref.teacher_forced(twin, run, s.inputs, s.inputs["input_ids"][0, :0])[0].log_softmax(-1)

    likelier = [sorted((s.target, s.other), key=lambda t, s=s: -float(log_p(s, None)[t])) for s in samples]
    right = [Sample(s.inputs, *pair) for s, pair in zip(samples, likelier, strict=True)]
    samples = [*right[:2], *(Sample(s.inputs, s.other, s.target) for s in right[2:])]  # two right answers, two wrong
    influence = {(i, h): [[], []] for i in range(4) for h in range(4)}
    for s in samples:
        plain, n = log_p(s, None), s.inputs["input_ids"].shape[1]
        wrong = bool(plain[s.other] >= plain[s.target])
        answer = s.other if wrong else s.target
        for (i, h), falls in influence.items():
            falls[wrong].append(float(plain[answer] - log_p(s, Silenced([0], n, [i], head=h))[answer]))
    assert [len(falls) for falls in influence[0, 0]] == [2, 2]
    value = {k: sum(w) / len(w) - sum(r) / len(r) for k, (r, w) in influence.items()}
    ranked = [f"{i}.{h}" for i, h in sorted(value, key=lambda k: -value[k]) if value[i, h] > 0]
    found = vlm_fix.parse_spec("ad_hh:top=16").calibrate(model, samples, 0, quiet)
    assert list(found["head_list"]) == ranked and len(ranked) > 1
    assert vlm_fix.parse_spec("ad_hh").calibrate(model, samples, 0, quiet)["head_list"] == (ranked[0],)
    with pytest.raises(vlm_fix.VlmFixError, match="0 of 4 questions were answered wrong"):
        vlm_fix.parse_spec("ad_hh").calibrate(model, right, 0, quiet)


def test_gift_takes_the_best_source_layer(family, model):
    samples, scores = labelled(family, (1, 2, 1)), []
    for layer in range(4):
        with vlm_fix.wrapped(model, f"gift:source_layer={layer},layers=1-3,template=0|0"):
            s = answer_scores(model, samples)
        right = float((s[:, 0] > s[:, 1]).float().mean())
        scores.append((right, float(s.log_softmax(-1)[:, 0].mean()), layer))
    assert len({score[:2] for score in scores}) > 1
    s = answer_scores(model, samples)
    plain = float((s[:, 0] > s[:, 1]).float().mean()), float(s.log_softmax(-1)[:, 0].mean())
    gift, best = vlm_fix.parse_spec("gift:layers=1-3,template=0|0"), max(scores)
    assert best[:2] > plain
    assert gift.calibrate(model, samples, 0, quiet) == {"source_layer": best[2]}
    if family == "qwen2_5_vl":  # on these two questions it answers worse with any
        with pytest.raises(vlm_fix.VlmFixError, match="with no source layer this model answers"):
            gift.calibrate(model, labelled(family, (2, 1)), 0, quiet)


def test_var_finds_planted_massive_activations(family):
    model, samples = BUILD[family](), labelled(family)
    with pytest.raises(
        vlm_fix.VlmFixError, match=r"no massive activations: the first token's largest ratio .* tau is 5"
    ):
        vlm_fix.parse_spec("var:tau=5").calibrate(model, samples, 0, quiet)
    model.get_input_embeddings().weight.data[1, [7, 21]] = torch.tensor([300.0, -300.0])  # token 1 begins every prompt
    assert vlm_fix.parse_spec("var:tau=5").calibrate(model, samples, 0, quiet) == {"sink_dims": (7, 21)}


# ---- the command, on Picto ----------------------------------------------------------------------------------------------


def test_calibrate_and_evaluate(tmp_path, capsys):
    out = tmp_path / "iri.json"
    command = [
        "calibrate",
        "iri:lambda_m=0.3",
        "--limit",
        "12",
        "--seed",
        "4",
        "--search",
        "lambda_a=0.1|0.9",
        "--out",
        str(out),
    ]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "lambda_a=0.1 " in text and "iri: rr_attention = " in text and "held-out accuracy" in text
    made = Calibration.read(out)
    assert (
        made.method == "iri"
        and made.command.startswith("vlm-fix calibrate iri:lambda_m=0.3 --model")
        and made.seed == 4
    )
    assert made.found["lambda_a"] in (0.1, 0.9) and made.found["lambda_m"] == 0.3, "what the user chose is kept"
    assert len(made.found["rr_attention"]) == len(made.found["rr_mlp"]) == 6
    assert made.data["questions"] == [12, 12] and made.score["questions"] == 12 and made.model["depth"] == 6
    assert made.model["weights"].startswith("sha256:") and set(made.versions) >= {"torch", "transformers", "vlm_fix"}
    assert cli.main([*command[:-1], str(tmp_path / "again.json"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["found"] == made.found and again["score"] == made.score, "the same seed finds the same"
    command = ["eval", "pope", "--method", "iri", "--limit", "2", "--split", "random", "--json"]
    assert cli.main([*command, "--calibration", str(out), "--output", str(tmp_path / "run")]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["settings"]["calibration"]["iri"]["rr_mlp"] == made.found["rr_mlp"]


def test_a_search_must_beat_the_model_alone(monkeypatch, capsys, tmp_path):
    """Also the value that changes nothing does not: no file is written. The command holds what was chosen."""
    from vlm_fix.eval import calibrate as module

    out = tmp_path / "pai.json"
    command = [
        "calibrate",
        "pai",
        "--limit",
        "12",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--search",
    ]
    assert cli.main([*command, "alpha=0|50"]) == 2
    said = capsys.readouterr().err
    assert "pai: the model alone answers" in said and "no value that was tried does better" in said and not out.exists()
    scores = iter([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    asked = []

    def made(net, samples, method):
        asked.append(None if method is None else method.alpha)
        return torch.tensor([[right, 0.5] for right in next(scores)])

    monkeypatch.setattr(module, "_scores", made)
    monkeypatch.setattr(module, "_compare", lambda *_: dict.fromkeys(SCORE, 0))
    assert cli.main([*command, "alpha=0.1|0.3"]) == 0
    assert asked == [None, 0.1, 0.3, None, 0.3] and Calibration.read(out).found == {"alpha": 0.3}
    text = capsys.readouterr().out
    assert "the model alone" in text and "0.333 right" in text
    assert Calibration.read(out).command.endswith("--search 'alpha=0.1|0.3' --dtype float32 --device cpu")


SCORE = [f"{what}_{when}" for what in ("accuracy", "yes_ratio", "sureness") for when in ("before", "after")]
SCORE += ["questions", "mended", "broken", "mcnemar_p"]


def test_halves_and_answer_tokens():
    from vlm_fix.eval import calibrate as module
    from vlm_fix.eval.run import loading

    model, processor, _ = loading.load_model("picto-llava")
    first, second = module._halves(module._questions("picto:train", 20, 1), 20, 1)
    assert len(first) == len(second) == 20 and not {s.file for s in first} & {s.file for s in second}
    yes, no = module._answer_ids(model, processor, module._encoded(model, processor, first[:8], lambda *_: None))
    assert [processor.tokenizer.decode([i]).strip().lower() for i in (yes, no)] == ["yes", "no"]
    words = module._vocabulary(processor, ["dog", "fire hydrant", "quasar"])
    assert {w: processor.tokenizer.decode([i]).strip() for w, i in words.items()} == {
        "dog": "dog",
        "fire hydrant": "fire",
    }


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
def test_user_error_of_calibrate_is_one_sentence(command, sentence, capsys, tmp_path):
    assert cli.main(command.format(dir=tmp_path / "out").split()) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["iri", "ad_hh", "head_pursuit"])
def test_bundled_model_carries_what_these_methods_need(name, tmp_path, capsys):
    from vlm_fix.eval import picto

    made = Calibration.read(picto.model_path() / "calibration" / f"{name}.json")
    assert made.method == name and made.model["weights"] == weights_id(
        SimpleNamespace(name_or_path=str(picto.model_path()))
    )
    command = ["eval", "pope", "--method", name, "--limit", "2", "--split", "random", "--json"]
    assert cli.main([*command, "--output", str(tmp_path / "run")]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["settings"]["calibration"][name] == made.found
