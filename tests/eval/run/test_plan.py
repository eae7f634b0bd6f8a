"""Which runs an evaluation has: controls at the methods' budget, beams for equal compute, seeds only where they matter."""

import json
import math
import os

import pytest
from rich.console import Console

import vlm_fix
from vlm_fix import registry
from vlm_fix.calibrated import Calibration, sizes
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import tasks
from vlm_fix.eval.report import measured, page, published
from vlm_fix.eval.report import tables as report
from vlm_fix.eval.run import generation, loading, plan
from vlm_fix.eval.run.runner import Settings, evaluate
from vlm_fix.eval.run.store import load_results
from vlm_fix.families import arch_of
from vlm_fix.pruning import PruningWing
from vlm_fix.wing import engine_of

MODEL = os.environ.get("VLM_FIX_TEST_MODEL", "picto-llava")


@pytest.fixture(scope="module")
def model():
    return loading.load_model(MODEL)[0]


def made(model, **settings):
    asked = Settings(**{"model": MODEL, "benchmark": "pope", "limit": 2, **settings})
    return {run.name: run for run in plan.runs(asked, model, tasks.build(asked))}


def test_a_plain_evaluation_is_the_baseline_and_the_methods(model):
    assert list(made(model, methods=(("vcd",), ("pai", "hiprune")))) == ["baseline", "vcd", "pai+hiprune"]
    sampled = made(model, methods=(("vcd",),), sample=True)
    assert list(sampled) == ["baseline", "greedy", "vcd"]
    assert dict(sampled["greedy"].decoding) == {"sample": False, "num_beams": 1}


def test_controls_share_the_budget_and_the_cut_off_of_the_methods(model):
    names = list(made(model, methods=(("vcd:beta=0.2",), ("hiprune:keep=16",), ("hiprune",)), controls=True))
    assert names[:2] == ["baseline", "sampled"] and names[2:5] == ["vcd:beta=0.2", "hiprune:keep=16", "hiprune"]
    assert {"apc_only:beta=0.2", "yes_bias", "random_heads"} <= set(names)
    assert {"random_tokens:keep=16", "random_tokens:keep=0.333333", "uniform_grid:keep=16"} <= set(names)
    assert names[-1] == "gaussian_logits as vcd:beta=0.2" and sum("gaussian" in name for name in names) == 1
    for name in names[2:-1]:
        registry.parse_spec(name)
    only_pruning = made(model, methods=(("hiprune:keep=16",),), controls=True)
    assert "apc_only" not in only_pruning and "random_tokens:keep=16" in only_pruning
    assert not any("gaussian" in name for name in only_pruning)
    captions = made(model, methods=(("vcd",),), controls=True, benchmark="chair", variant="pattern")
    assert "yes_bias" not in captions and "apc_only:beta=0.1" in captions
    once = made(model, methods=(("apc_only:beta=0.1",), ("vcd",)), controls=True)
    assert sum(name.startswith("apc_only") for name in once) == 1
    uncut = made(model, methods=(("vcd",), ("vcd:beta=0",)), controls=True)
    assert [name for name in uncut if name.startswith("apc_only")] == ["apc_only:beta=0.1"]


def test_a_third_of_the_tokens_is_the_same_number_for_method_and_control(model):
    names = made(model, methods=(("hiprune",),), controls=True)
    control = names["random_tokens:keep=0.333333"].stack[0]
    assert [control.budget(n) for n in (64, 576, 2880)] == [21, 192, 960]


def test_equal_compute_counts_forward_passes(model):
    assert "beams=2" in made(model, methods=(("vcd",), ("pai",)), equal_compute=True)
    both = made(model, methods=(("vcd",), ("causalmm",), ("causalmm:vision=none",)), equal_compute=True)
    assert [name for name in both if name.startswith("beams")] == ["beams=2", "beams=3"]
    assert list(made(model, methods=(("vcd",),), equal_compute=True, sample=True))[:3] == [
        "baseline",
        "greedy",
        "beams=2",
    ]
    with pytest.raises(VlmFixError, match="no method of this run takes a second forward pass"):
        made(model, methods=(("pai",), ("vcd:alpha=0",)), equal_compute=True)


def test_seeds_repeat_only_what_draws_at_random(model):
    methods = (("vcd",), ("pai",), ("random_tokens:keep=8",), ("random_tokens:keep=8,seed=5",))
    greedy = made(model, methods=methods, seeds=(3, 4))
    assert {name: run.seeds for name, run in greedy.items()} == {
        "baseline": (3,),
        "vcd": (3, 4),
        "pai": (3,),
        "random_tokens:keep=8": (3, 4),
        "random_tokens:keep=8,seed=5": (3,),
    }
    sampled = made(model, methods=methods, seeds=(3, 4), sample=True)
    assert {name for name, run in sampled.items() if run.seeds == (3,)} == {"greedy"}
    assert all(run.seeds == (0,) for run in made(model, methods=methods).values())
    with pytest.raises(VlmFixError, match="names a seed twice"):
        Settings(seeds=(1, 1))


def test_a_run_seeds_its_methods_unless_the_user_did(model):
    run = made(model, methods=(("random_tokens:keep=8",),), seeds=(3, 4))["random_tokens:keep=8"]
    fixed = made(model, methods=(("random_tokens:keep=8,seed=5",),))["random_tokens:keep=8,seed=5"]
    for each, seed, expected in ((run, 4, 4), (run, None, 0), (fixed, 4, 5)):
        with each.applied(model, seed=seed):
            assert engine_of(model).wing(PruningWing).pruners.pruner.seed == expected
    assert not hasattr(model, "_vlm_fix_engine")
    with made(model)["baseline"].applied(model, seed=1):
        assert not hasattr(model, "_vlm_fix_engine")


def test_noise_takes_the_place_of_the_contrast_and_of_what_acts_in_its_branch_alone(model):
    asked = (("pai", "vcd", "var:branch=negative"), ("hiprune:keep=16", "icd:beta=0.3"), ("pai",), ("m3id",),
             ("vcd:alpha=0",), ("vcd", "gaussian_logits:sigma=2"), ("yes_bias",), ("pai:gamma=1.1",))  # fmt: skip
    noise = {run.imitates: run for run in made(model, methods=asked, controls=True).values() if run.imitates}
    assert {name: [m.spec() for m in run.sized(1.23456).stack] for name, run in noise.items()} == {
        "pai+vcd+var:branch=negative": ["gaussian_logits:sigma=1.23,beta=0.1", "pai"],
        "hiprune:keep=16+icd:beta=0.3": ["gaussian_logits:sigma=1.23,beta=0.3", "hiprune:keep=16.0"],
        "m3id": ["gaussian_logits:sigma=1.23,beta=0.1"],
        "pai:gamma=1.1": ["gaussian_logits:sigma=1.23,beta=0.1"],
    }
    assert noise["m3id"].sized(0.00012349).spec == "gaussian_logits:sigma=0.000123,beta=0.1"
    assert noise["m3id"].sized(None).spec == "gaussian_logits:sigma=0.0,beta=0.1"
    assert all(run.name == f"gaussian_logits as {name}" for name, run in noise.items())
    found = Calibration("vcd", {"beta": 0.25}, {"name": "m", **sizes(arch_of(model))})
    settings = Settings(model=MODEL, benchmark="pope", limit=2, methods=(("vcd",),), controls=True)
    runs = {run.name: run for run in plan.runs(settings, model, tasks.build(settings), [found])}
    assert "apc_only:beta=0.25" in runs and runs["gaussian_logits as vcd"].stack[0].beta == 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Controls of a contrast, and of one that leaves a single token at every step."""
    folder = tmp_path_factory.mktemp("noise") / "out"
    settings = Settings(model=MODEL, methods=(("vcd",), ("pai", "vcd:beta=1")), controls=True, limit=2, batch_size=4,
                        splits=("random",), max_new_tokens=12, variant="pattern")  # fmt: skip
    report.write(evaluate(settings, folder, console=Console(quiet=True)), folder)
    return folder


def test_noise_has_the_size_that_the_contrast_was_measured_to_have_on_each_benchmark(model, folder):
    results = load_results(folder)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    sigma, several = {}, 0
    for benchmark in ("pope", "chair"):
        squares, dof, seen = 0.0, 0, set()
        for row in rows:
            if (row["run"], row["benchmark"]) == ("vcd", benchmark) and row["batch"] not in seen:
                seen.add(row["batch"])
                squares, dof = squares + row["batch_term"][0], dof + row["batch_term"][1]
        several += len(seen) > 1
        assert results["term_sd"]["vcd"][benchmark] == pytest.approx(math.sqrt(squares / dof), rel=1e-12)
        sigma[benchmark] = float(f"{math.sqrt(squares / dof):.3g}")
    assert several and sigma["pope"] != sigma["chair"]
    specs = {b: f"gaussian_logits:sigma={sigma[b]},beta=0.1" for b in sigma}
    assert results["specs"]["gaussian_logits as vcd"] == specs
    assert not any(row["batch_term"] for row in rows if row["run"].split(":")[0] in ("baseline", "apc_only"))
    asked = Settings(limit=2, variant="pattern", splits=("random",))
    loaded, name = loading.load_model(MODEL)[:2], "gaussian_logits as vcd"
    for task in tasks.build(asked):
        answers = {row["id"]: row["answer"] for row in rows if (row["run"], row["benchmark"]) == (name, task.benchmark)}
        with vlm_fix.wrapped(loaded[0], specs[task.benchmark]):
            for batch in generation.batches(task.samples, 4):
                images, prompts = [tasks.sample.load_image(s) for s in batch], [s.prompt for s in batch]
                alone = generation.generate(*loaded, images, prompts, 0, **asked.generate_kwargs(12))
                assert alone.texts == [answers[s.id] for s in batch]


def test_a_contrast_without_a_term_is_told_and_gets_no_noise(folder):
    results, name = load_results(folder), "pai+vcd:beta=1"
    assert results["term_sd"][name] == {"pope": None, "chair": None}
    spec = "gaussian_logits:sigma=0.0,beta=1.0+pai"
    assert results["specs"][f"gaussian_logits as {name}"] == {"pope": spec, "chair": spec}
    text = (folder / "table.md").read_text()
    assert f"`{name}`: no step of POPE, CHAIR left it two tokens: it has no term there" in text
    assert f"`gaussian_logits as {name}`: ran POPE as {spec}, CHAIR as {spec}: noise of the size" in text


def test_tables_and_pages_show_the_sizes_and_the_control(folder):
    results = load_results(folder)
    grid = next(g for g in report.grids(results) if g.caption == report.TERM)
    assert [(run, [c.text for c in cells]) for _, run, cells in grid.rows] == [
        ("vcd", [f"{results['term_sd']['vcd'][b]:.3g}" for b in ("pope", "chair")]),
        ("pai+vcd:beta=1", ["-", "-"]),
        ("yes_bias", [f"{results['term_sd']['yes_bias'][b]:.3g}" for b in ("pope", "chair")]),
    ]
    assert "gaussian_logits as vcd" in page.page([folder]) and "noise of the size of M" in page.leaderboard([folder])
    assert {line["method"] for line in published.compare(results)} == {"vcd"}
    assert [row.spec for row in measured.read(folder.parent)["gaussian_logits"]] == ["gaussian_logits as vcd"]


def test_the_share_of_gated_steps_is_counted_and_shown(tmp_path):
    """The gate of a contrast that changes no probability: its steps are those that the model alone is sure of."""
    methods = (("yes_bias:alpha=0.000001,gate=0.9",), ("vcd",))
    settings = Settings(model=MODEL, methods=methods, benchmark="chair", limit=3, batch_size=2, max_new_tokens=8,
                        variant="pattern")  # fmt: skip
    results = evaluate(settings, tmp_path / "out", console=Console(quiet=True))
    loaded, gates, steps = loading.load_model(MODEL)[:2], 0, 0
    (task,) = tasks.build(settings)
    for sample in task.samples:
        inputs = generation.encode(*loaded, [tasks.sample.load_image(sample)], [sample.prompt])
        how = {**settings.generate_kwargs(8), "output_logits": True, "return_dict_in_generate": True}
        for logits in loaded[0].generate(**inputs, **how).logits:
            gates, steps = gates + (float(logits[0].softmax(-1).max()) >= 0.9), steps + 1
    assert 0 < gates < steps
    assert results["gated"] == {methods[0][0]: {"chair": pytest.approx(gates / steps)}}
    grid = next(g for g in report.grids(results) if g.caption == report.GATED)
    assert grid.rows[0][1:] == (methods[0][0], (report.Cell(f"{100 * gates / steps:.3g}"),))
