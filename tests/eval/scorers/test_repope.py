"""RePOPE: the ids in the package against its own files, and figures of real answers."""

import doctest
import json

import pytest

from tests.support.paths import DATA
from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval import tasks
from vlm_fix.eval.scorers import pope
from vlm_fix.eval.scorers.pope import data as pope_data
from vlm_fix.eval.scorers.pope import repope
from vlm_fix.eval.settings import Settings

KINDS = ("random", "popular", "adversarial")
FILES = DATA / "repope"
needs_data = pytest.mark.skipif(not FILES.exists(), reason=f"RePOPE's own files are not at {FILES}")


def test_worked_example() -> None:
    assert doctest.testmod(repope).failed == 0


@needs_data
@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_in_the_package_give_the_official_files(kind: str) -> None:
    official = pope_data.load_questions(FILES / f"coco_repope_{kind}.json")
    assert repope.relabelled(pope_data.coco_questions(kind)) == (kind, official)
    assert repope.whole_split(official) == pope_data.coco_questions(kind)
    assert repope.relabelled(official) is None and repope.whole_split(pope_data.coco_questions(kind)) is None


@needs_data
def test_scores_of_real_answers(capsys) -> None:
    files = [str(DATA / "pope" / name) for name in ("coco_pope_random.json", "answers_llava15/coco_random.jsonl")]
    expected = {"tp": 1097, "fp": 160, "tn": 1455, "fn": 62, "accuracy": 0.91997, "f1": 0.90811}
    own = [str(FILES / "coco_repope_random.json"), files[1]]  # RePOPE's file with answers made for POPE
    for arguments in ([*files], [*files, "--labels", "repope"], own):
        assert cli.main(["score", "pope", *arguments, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        if arguments == files:
            assert round(found["accuracy"], 5) == 0.91367  # POPE's own, as before
            found = found["repope"]
        assert {name: round(found[name], 5) for name in expected} == expected and found["labels"] == "repope"
    assert cli.main(["score", "pope", *files]) == 0
    shown = capsys.readouterr().out.split()
    assert "POPE" in shown and "RePOPE" in shown
    assert cli.main(["score", "pope", *files, "--labels", "pope"]) == 0
    assert "RePOPE" not in capsys.readouterr().out


def test_other_questions_have_no_labels_of_repope() -> None:
    others = pope_data.make_questions(
        [("1.jpg", ["dog", "cup", "cat"]), ("2.jpg", ["car", "cup", "bus"])], images=2, per_image=4
    )
    assert repope.relabelled(others) is None
    with pytest.raises(VlmFixError, match="leave out --labels repope"):
        repope.needed(others)


def test_eval_asks_a_question_once_and_judges_it_by_both_labels(tmp_path) -> None:
    questions = {kind: pope_data.coco_questions(kind) for kind in KINDS}
    names = list(dict.fromkeys(q.image for q in questions["random"]))[:5]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    settings = Settings("pope", data=f"coco:{tmp_path}", limit=5)
    (both,) = tasks.build(settings)
    assert list(both.sizes) == [*KINDS, *(f"{kind} RePOPE" for kind in KINDS)]
    assert all(both.sizes[f"{kind} RePOPE"] < both.sizes[kind] == 30 for kind in KINDS)
    (plain,) = tasks.build(Settings("pope", data=f"coco:{tmp_path}", limit=5, labels="pope"))
    assert both.samples == [s for s in both.samples if s.id in {p.id for p in plain.samples}]
    assert list(plain.sizes) == [*KINDS]
    yes = {sample.id: "yes" for sample in both.samples}
    (checked,) = tasks.build(Settings("pope", data=f"coco:{tmp_path}", limit=5, labels="repope"))
    for kind in KINDS:
        mine, theirs = both.score(yes)[f"{kind} RePOPE"], checked.score(yes)[kind]
        assert mine.rows == theirs.rows and mine.n == checked.sizes[kind]
    assert {*pope.BENCHMARK.layouts["pope"].answers.groups} == {
        f"{kind} RePOPE" for kind in KINDS
    }  # no mean counts them
    for wrong in (Settings("pope", labels="repope"), Settings("chair", labels="repope")):
        with pytest.raises(VlmFixError, match="labels"):
            tasks.build(wrong)
