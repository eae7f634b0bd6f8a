"""The benchmark tab equals the runner."""

import shlex
import shutil

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio")

from tests.demo.shared import PROMPT, SMALL, last
from vlm_fix import VlmFixError, cli
from vlm_fix.demo import benchmark, compare, examples
from vlm_fix.eval.run import runner


def test_a_stopped_benchmark_continues_and_equals_the_runner(loaded, measured, tmp_path):
    settings, _, seen, said = measured
    lone = runner.evaluate(settings, tmp_path, console=benchmark.Console(quiet=True))
    timed = ("date", "speed")
    got = seen[-1].results
    assert {k: v for k, v in got.items() if k not in timed} == {k: v for k, v in lone.items() if k not in timed}
    assert seen[-1].done == seen[-1].total == sum(count["answers"] for count in got["changed"].values())
    assert [s.done for s in seen] == sorted(s.done for s in seen)
    alone = last(compare.compare(loaded, examples.scenes()[0].image, PROMPT, [["vhr"]]))
    assert [pane.text for pane in said] == [pane.text for pane in alone]
    assert not hasattr(loaded.model, "_vlm_fix_engine") and not loaded.turn.line


def test_results_are_shown_kept_and_opened_again(measured, tmp_path):
    results = measured[2][-1].results
    picture, archive = benchmark.keep(results, measured[1])
    assert Image.open(picture).width > 500
    shutil.unpack_archive(archive, tmp_path / "out")
    assert {"results.json", "samples.jsonl", "table.md", "figure.png"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert benchmark.open_results(tmp_path / "out") == benchmark.open_results(tmp_path / "out/results.json") == results
    shown = benchmark.table(results)
    for run, scores in results["runs"].items():
        assert f"| `{run}` |" in shown and f"{100 * scores['chair']['captions']['recall']:.1f}" in shown
    assert shown.count("<small>") >= sum(
        len(split["delta"])
        for scores in results["runs"].values()
        for part in scores.values()
        for split in part.values()
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": 1}', '{"runs": {"a": {}}}'])
def test_what_is_no_result_is_one_sentence(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(VlmFixError, match="This is no results.json") as error:
        benchmark.open_results(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(VlmFixError, match="There is no results.json"):
        benchmark.open_results(tmp_path / "nowhere")


def test_a_benchmark_that_cannot_run_is_one_sentence(loaded, tmp_path):
    with pytest.raises(VlmFixError, match="1 to 500 scenes, not 501"):
        benchmark.settings_of("picto-llava", "pope", "shift", 501, [], 0)
    settings = benchmark.settings_of("picto-llava", "pope", "shift", 5, ["vcd+icd"], 0)
    with pytest.raises(VlmFixError, match="both contrast"):
        last(benchmark.run(loaded, settings, tmp_path / "run", compare.Stop()))
    assert not loaded.turn.line


def test_the_benchmark_command_is_the_same_run(monkeypatch, tmp_path, capsys):
    settings, seen = benchmark.settings_of(*SMALL), []

    def evaluate(*given, **options):
        seen.append(given[0])
        raise VlmFixError("enough")

    monkeypatch.setattr(runner, "evaluate", evaluate)
    words = shlex.split(benchmark.as_command(settings).replace("\\\n", ""))
    assert cli.main([*words[1:], "--output", str(tmp_path)]) == 2 and seen == [settings]
    capsys.readouterr()
