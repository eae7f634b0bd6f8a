"""One sentence and one table of a benchmark; candidates of a recommendation, and the search itself."""

import copy
import re

import pytest

pytest.importorskip("gradio", reason="the demo needs gradio")

from tests.support.paths import ROOT
from vlm_fix import VlmFixError
from vlm_fix.demo import benchmark, board, compare, recommended
from vlm_fix.presets import Preset


@pytest.fixture(scope="module")
def results():
    return benchmark.open_results(ROOT / "results/picto-smol-shift")


def test_the_sentence_is_the_verdicts(results):
    tone, said = board.headline(results)
    losers = [
        run
        for run in list(results["runs"])[1:]
        if any(verdict["is"].startswith("worse") and verdict["sure"] for _, verdict in board.judged(results, run))
    ]
    assert tone == "bad" and said.startswith("Nothing here beats the model itself") and ", ".join(losers) in said
    better = copy.deepcopy(results)
    for parts in better["runs"]["pai"].values():
        for scores in parts.values():
            scores["verdict"] = {"is": "same", "text": "no difference seen: accuracy 1 to 1"}
    better["runs"]["pai"]["chair"]["captions"]["verdict"] = {"is": "better", "text": "better: CHAIR_i 16.1 to 12.0"}
    for name, each in better["runs"]["pai"]["chair"]["captions"]["delta"].items():
        each.update(delta=-0.04 if name.startswith("chair") else 0.0, p_holm=0.2)
    better["runs"]["pai"]["chair"]["captions"]["equal_length"] = {}
    assert not board.headline(better)[1].startswith("pai"), "what Holm's correction takes away is no gain"
    better["runs"]["pai"]["chair"]["captions"]["delta"]["chair_i"]["p_holm"] = 0.01
    named = {"greedy": "pai", "gaussian_logits as vcd": "pai"}
    controls = {
        **better,
        "runs": {"baseline": better["runs"]["baseline"]} | {n: better["runs"][r] for n, r in named.items()},
    }
    assert "choose a method" in board.headline(controls)[1], "a control wins nothing"
    tone, said = board.headline(better)
    assert tone == "good" and said.startswith("pai is better than the model itself") and "CHAIR_i 16.1 to 12.0" in said
    better["runs"]["pai"]["pope"]["random"]["verdict"]["is"] = "worse by saying yes"
    better["runs"]["pai"]["pope"]["random"]["delta"]["accuracy"].update(delta=-0.1, p_holm=0.01)
    assert board.headline(better)[0] == "bad" and "pai wins and loses" in board.headline(better)[1]
    better["runs"]["pai"]["pope"]["random"]["verdict"]["is"] = "same"
    better["runs"]["pai"]["chair"]["captions"]["verdict"]["is"] = "better by saying less"
    assert not board.headline(better)[1].startswith("pai")  # saying less is no merit
    alone = {**results, "runs": {"baseline": results["runs"]["baseline"]}}
    assert "choose a method" in board.headline(alone)[1]


def test_the_table_has_every_run_and_marks_what_counts(results):
    shown = board.table(results)
    assert shown.count("<tr>") == 1 + len(results["runs"]) and shown.count("<td") == 8 * len(results["runs"])
    vhr = shown[shown.index('scope="row">vhr<') :].partition("</tr>")[0]
    assert 'class="worse" data-head="POPE random"' in vhr and "+20.4 [16.3, 24.3]" in vhr
    assert "worse" not in shown[shown.index('scope="row">baseline<') :].partition("</tr>")[0]


def test_candidates_are_listed_with_bars():
    rows = [
        recommended.Row("<b>", 16, 2.0, 1.0, ("recall",), False),
        recommended.Row("yes_bias", 8, -3.0, 1.0, (), True),
        recommended.Row("new", 1, 0.5, float("inf"), (), False),
        recommended.Row(
            "pai", 8, -1.0, 0.5, ("recall",), False, "surely no better: -1.0 points, misses recall, on 8 images"
        ),
    ]
    shown = recommended.table(rows)
    assert "<b>&lt;" not in shown and "&lt;b&gt;" in shown and "misses recall" in shown and "<i>control</i>" in shown
    assert (
        '<tr class="out"><th scope="row">pai<small>surely no better: -1.0 points, misses recall' in shown
        and shown.count('"out"') == 1
    )
    assert "+2.0 ± 1.0" in shown and "inf" not in shown and recommended.table([]) == ""
    ends = [tuple(map(float, at)) for at in re.findall(r"left:([\d.]+)%;width:([\d.]+)%", shown)]
    assert ends[0] == (50.0, 25.0) and ends[1] == (12.5, 37.5)


@pytest.mark.slow
def test_a_search_in_the_page_is_that_of_the_command_line(loaded, tmp_path):
    wanted = recommended.Wanted("picto-llava", scenes=20, budget="60s", only=("vhr:alpha=1.5",))
    stop = compare.Stop()
    stop.set()
    *_, stopped = recommended.search(loaded, wanted, tmp_path / "a", stop)
    assert stopped.found is None and not loaded.turn.line
    *seen, last = recommended.search(loaded, wanted, tmp_path / "b", compare.Stop())
    assert last.found and "keep it as it is" in last.found.verdict  # 20 scenes claim nothing
    assert seen[0].said == "waiting for the model" and any(state.rows for state in [*seen, last])
    preset = Preset.read(tmp_path / "b/vlm-fix.yaml")
    assert preset.about["verdict"] == last.found.verdict and (tmp_path / "b/vlm-fix.html").exists()
    assert last.found.verdict[1:] in recommended.verdict(last.found).replace("&#x27;", "'")
    assert not hasattr(loaded.model, "_vlm_fix_engine") and not loaded.turn.line


def test_a_bad_search_is_one_sentence(loaded, tmp_path):
    with pytest.raises(VlmFixError, match="no method 'vhrr'"):
        for _ in recommended.search(
            loaded, recommended.Wanted("picto-llava", only=("vhrr",)), tmp_path, compare.Stop()
        ):
            pass
    said = recommended.Wanted("picto-llava", only=("vhr", "pai")).as_command()
    assert said.startswith("vlm-fix recommend ") and "--method vhr,pai" in said and "--budget 3m" in said
