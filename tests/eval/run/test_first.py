"""p_yes and p_no of the first token equal what plain forwards give, and pope-prob scores them from the samples of a run."""

import json

import pytest
import torch

import vlm_fix
from vlm_fix import cli
from vlm_fix.eval import tasks
from vlm_fix.eval.run import generation
from vlm_fix.eval.run.first import FirstToken, tokens_of, yes_no_tokens
from vlm_fix.eval.run.loading import load_model
from vlm_fix.eval.scorers import pope_prob
from vlm_fix.eval.settings import Settings

PENALTY = 1.3


@pytest.fixture(scope="module")
def loaded():
    return load_model("picto-llava")


@pytest.fixture(scope="module")
def asked():
    (task,) = tasks.build(Settings(benchmark="pope", data="picto:shift", limit=4, splits=("random",)))
    samples = [task.samples[0], task.samples[-1]]
    return [tasks.load_image(s) for s in samples], [s.prompt for s in samples]


def alone(loaded, images, prompts, change=lambda ids, z: z):
    """p_yes and p_no of each prompt, by a forward of its own without padding; `change` edits the logits [V]."""
    model, processor, _ = loaded
    words, found = tokens_of(processor.tokenizer), []
    for image, prompt in zip(images, prompts, strict=True):
        inputs = generation.encode(model, processor, [image], [prompt])
        with torch.no_grad():
            z = model(**inputs).logits[0, -1].double()
        p = change(inputs["input_ids"][0], z).softmax(-1)
        found.append([float(sum(p[i] for i in words[word].values())) for word in ("yes", "no")])
    return found


def read(loaded, images, prompts, spec="", **how):
    model, processor, _ = loaded
    how = Settings(**how).generate_kwargs(1)
    if not spec:
        return generation.generate(model, processor, images, prompts, 0, yes_no=True, **how)
    with vlm_fix.wrapped(model, spec):
        return generation.generate(model, processor, images, prompts, 0, yes_no=True, **how)


def penalised(ids, z):
    seen = ids.unique()
    z[seen] = torch.where(z[seen] < 0, z[seen] * PENALTY, z[seen] / PENALTY)
    return z


@pytest.mark.parametrize(
    ("how", "change"),
    [
        ({}, lambda ids, z: z),
        ({"sample": True, "temperature": 0.4, "top_p": 0.3}, lambda ids, z: z),  # before the sampler
        ({"num_beams": 3}, lambda ids, z: z),
        ({"gen_kwargs": {"repetition_penalty": PENALTY}}, penalised),  # after generate's own processors
    ],
    ids=["greedy", "sampled", "beams", "penalty"],
)
def test_the_probabilities_are_those_of_the_first_step(loaded, asked, how, change):
    batch = read(loaded, *asked, **how)
    for got, wanted in zip(batch.yes_no, alone(loaded, *asked, change), strict=True):
        assert got == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("spec", ["vcd:alpha=1.5", "pai:alpha=0.8"])
def test_a_method_is_in_the_probabilities(loaded, asked, spec):
    """As the scores that `generate` returns, and for the contrast by hand from both branches."""
    model, processor, _ = loaded
    inputs, words = generation.encode(model, processor, *asked), tokens_of(processor.tokenizer)
    with vlm_fix.wrapped(model, spec):
        torch.manual_seed(0)
        out = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
    p = out.scores[0].softmax(-1)
    wanted = [[float(row[[*words[w].values()]].sum()) for w in ("yes", "no")] for row in p]
    batch = read(loaded, *asked, spec=spec)
    plain = read(loaded, *asked)
    assert torch.tensor(batch.yes_no) == pytest.approx(torch.tensor(wanted), abs=1e-5)
    assert (torch.tensor(batch.yes_no) - torch.tensor(plain.yes_no)).abs().max() > 0


def test_a_loop_of_its_own_and_a_vocabulary_without_the_words_are_not_read(loaded, asked):
    model = loaded[0]
    assert not generation.chooses_tokens(model)
    for spec, own in (("opera", True), ("sgrs", True), ("vcd", False)):
        with vlm_fix.wrapped(model, spec):
            assert generation.chooses_tokens(model) is own
    assert yes_no_tokens(["▁YES", "Ġyes", "yes.", "yesterday", "no", None])["yes"] == {"▁YES": 0, "Ġyes": 1}
    none = FirstToken(yes_no_tokens(["ye", "s", "no"]), 1, 1)
    assert none(None, torch.zeros(1, 3)).shape == (1, 3) and none.probabilities() is None


def test_the_samples_of_a_run_are_scored_by_probability(tmp_path, capsys):
    """AUROC over pairs and ECE by hand, in results.json and from `score pope-prob`; a run within a run compares."""
    run = f"eval pope --limit 2 --split random,popular --method vcd --batch-size 4 --output {tmp_path / 'a'}"
    assert cli.main(run.split()) == 0
    rows = [json.loads(line) for line in (tmp_path / "a/samples.jsonl").read_text().splitlines()]
    assert all(0 <= row["p_yes"] + row["p_no"] <= 1.000001 for row in rows)
    mine = [row for row in rows if row["run"] == "vcd" and "popular" in row["splits"]]
    p = [(row["p_yes"] / (row["p_yes"] + row["p_no"]), row["label"] == "yes") for row in mine]
    pairs = [(a > b) + (a == b) / 2 for a, yes in p for b, no in p if yes and not no]
    results = json.loads((tmp_path / "a/results.json").read_text())["probabilities"]
    assert results["runs"]["vcd"]["pope"]["popular"]["auroc"] == pytest.approx(sum(pairs) / len(pairs))
    assert (results["yes_tokens"], results["no_tokens"]) == (["yes"], ["no"])
    assert "p(yes) + p(no)" in (tmp_path / "a/table.md").read_text()
    capsys.readouterr()
    assert cli.main(f"score pope-prob {tmp_path / 'a'} --json".split()) == 0
    told = json.loads(capsys.readouterr().out)
    assert {*told} == {f"{run}: {split}" for run in ("baseline", "vcd") for split in ("random", "popular")}
    assert told["vcd: popular"]["auroc"] == pytest.approx(sum(pairs) / len(pairs))
    assert told["vcd: popular"]["yes_tokens"] == "'yes'" and told["vcd: popular"]["n"] == len(mine) == 12
    options = f"{tmp_path / 'a'} {tmp_path / 'a/samples.jsonl'} --benchmark pope-prob --method vcd"
    assert cli.main(f"compare {options}".split()) == 0
    assert "no difference seen" in capsys.readouterr().out
    for line, words in (
        (f"score pope-prob coco:random {tmp_path / 'a'}", "brings its questions along"),
        (f"score pope-prob {tmp_path / 'a'} --method pai", "has no run 'pai': give one of baseline, vcd"),
    ):
        assert cli.main(line.split()) == 2 and words in capsys.readouterr().err


def test_a_split_with_corrected_labels_is_scored_by_them():
    base = {
        "run": "r",
        "benchmark": "pope",
        "image": "1.jpg",
        "prompt": "Is there a dog?",
        "splits": ["random", "random RePOPE"],
    }
    rows = [
        {**base, "id": "a", "label": "yes", "labels": {"random RePOPE": "no"}, "p_yes": 0.2, "p_no": 0.7},
        {**base, "id": "b", "label": "no", "p_yes": 0.1, "p_no": 0.7},
        {**base, "id": "c", "label": "yes", "p_yes": None, "p_no": None},  # failed
    ]
    found = pope_prob.of_samples(rows)
    assert found["r", "pope", "random"].figures["accuracy"] == 0.5
    assert found["r", "pope", "random RePOPE"].figures["accuracy"] == 1 and found["r", "pope", "random"].n == 2
