"""A caption that failed is left out, told, and never an empty caption, which would have no hallucination."""

import pytest

from vlm_fix.errors import VlmFixError
from vlm_fix.eval import tasks
from vlm_fix.eval.report import tables
from vlm_fix.eval.run import summary
from vlm_fix.eval.settings import Settings

ALL = "a dog, a cat, a car, a cup, a chair, a bed, a bus and a train"  # most of it hallucinated in every scene


def summarised(benchmark, said):
    """The summary of runs whose captions are `said`, run -> place -> caption; None failed."""
    built = tasks.build(Settings(benchmark=benchmark, data="picto:shift", limit=4, variant="pattern"))

    def rows_of(run, task):
        samples = next(t.samples for t in built if t.benchmark == task)
        texts = said[run] if task == benchmark else [s.reference["label"] for s in samples]
        return [
            {"id": s.id, "answer": text, "error": None if text is not None else "OutOfMemoryError: 8 GB"}
            for s, text in zip(samples, texts, strict=True)
        ]

    return built, summary.summarise([*said], built, rows_of)


@pytest.mark.parametrize(("benchmark", "metric"), [("chair", "chair_i"), ("amber", "chair")])
def test_a_failed_caption_is_left_out_of_figures_and_comparisons(benchmark, metric):
    whole = [ALL] * 4
    said = {"baseline": whole, "half": [ALL, None, None, ALL], "all": whole}
    built, found = summarised(benchmark, said)
    base, half, same = (found[run][benchmark]["captions"] for run in said)
    assert [each["failed"] for each in (base, half, same)] == [0, 2, 0]
    assert [each["n"] for each in (base, half, same)] == [4, 2, 4]
    kept = {s.id: ALL for s in (built[0].samples[0], built[0].samples[3])}
    alone = built[0].score(kept)["captions"].to_dict()
    assert half[metric] == alone[metric] > 0
    assert half["delta"][metric]["delta"] == 0 and half["delta"][metric]["base"] == alone[metric]  # of the same two
    assert half["outcomes"] == {"mended": 0, "broken": 0, "p": 1.0} and half["verdict"]["is"] == "same"
    if benchmark == "amber":
        assert half["delta"]["score"]["delta"] == pytest.approx(0)
    shown = {"settings": {"data": {benchmark: {"source": "s", "images": 4, "variant": "pattern"}}}, "runs": found}
    shown |= {"hardware": "", "peak_memory_of": "", "processes": 1}
    shown["settings"] |= {"model": {"dtype": ""}, "batch_size": 1}
    text = tables._captions(shown)[benchmark]
    assert text.endswith("captions failed and are left out: 2 of half (see samples.jsonl)")


def test_runs_without_a_caption_in_common_are_not_compared():
    _, found = summarised("chair", {"baseline": [ALL, ALL, None, None], "other": [None, None, ALL, ALL]})
    assert found["other"]["chair"]["captions"]["delta"] == {} and "verdict" not in found["other"]["chair"]["captions"]


def test_a_run_whose_captions_all_failed_is_an_error():
    with pytest.raises(
        VlmFixError, match=r"method: none of the 4 captions of chair was made \(OutOfMemoryError: 8 GB\)"
    ):
        summarised("chair", {"baseline": [ALL] * 4, "method": [None] * 4})


@pytest.mark.parametrize("benchmark", ["pope", "amber"])
def test_a_run_whose_answers_all_failed_is_an_error(benchmark):
    """It is not a method that is wrong throughout: no verdict, and the command does not end in 0."""
    built = tasks.build(Settings(benchmark=benchmark, data="picto:shift", limit=2))
    task = next(t for t in built if "label" in t.samples[0].reference)

    def rows_of(run, name):
        texts = [None if run == "method" else s.reference["label"] for s in task.samples]
        return [
            {"id": s.id, "answer": text, "error": None if text else "IndexError: tuple index out of range"}
            for s, text in zip(task.samples, texts, strict=True)
        ]

    assert summary.summarise(["baseline", "other"], [task], rows_of)["other"]
    told = rf"method: none of its {len(task.samples)} answers to {task.benchmark} was made \(IndexError: tuple"
    with pytest.raises(VlmFixError, match=told):
        summary.summarise(["baseline", "method"], [task], rows_of)
