"""What a reader takes a reply for: languages, thoughts, denials and doubts."""

import doctest
import json

import pytest

from vlm_fix import cli
from vlm_fix.eval.scorers import plain, yesno

NO = [
    "There isn't one.",
    "There isn’t any dog in the image.",
    "I don't see any dog.",
    "It is not in the image.",
    "None.",
    "NO",
    "Sorry, no.",
    "对不起，没有",
    "是否有狗？没有",
    "不是。",
    "答案：没有",
    "<thought>Yes</thought>No",
    "[THINK]yes[/THINK]no",
    "Thinking: yes, perhaps... Answer: No",
    "**Final answer:** No",
    "HAYIR",
    "Nao",
    "नहीं",
    "जी नहीं, कोई कुत्ता नहीं है",
    "όχι",
    "ΌΧΙ.",
    "ไม่",
    "ไม่ใช่",
    "ないです",
    "いいえ",
    "아니요",
    "없습니다",
    "לא",
    "Tidak ada.",
    "Não, não há.",
    "False",
    "না, নেই",
    "இல்லை.",
    "లేదు",
    "Ne, není.",
]
YES = [
    "Yes, it isn't hidden.",
    "The answer is yes.",
    "是的，有一只狗",
    "有。",
    "对",
    "हाँ",
    "ใช่",
    "はい、います",
    "네, 있습니다",
    "ναι",
    "Sí, hay uno.",
    "Bueno, sí.",
    "[THINK]no?[/THINK] Yes",
    "True.",
    "হ্যাঁ, আছে",
    "ஆம்",
    "అవును",
    "Taip.",
]
UNKNOWN = [
    "I don't know.",
    "I cannot tell.",
    "It is not clear.",
    "It is not possible to determine this.",
    "I'm not sure.",
    "不确定",
    "不知道",
    "有可能",
    "A dog.",
    "Hindi is spoken.",
    "নাম কী?",
    "",
]


def test_worked_example():
    assert doctest.testmod(plain).failed == 0


@pytest.mark.parametrize(
    "word, reply", [(w, r) for w, each in (("no", NO), ("yes", YES), ("unknown", UNKNOWN)) for r in each]
)
def test_the_plain_word(word, reply):
    assert plain.plain(reply) == word == yesno.verdict(reply, "no", "ours")


def test_a_denial_that_pope_takes_for_yes_is_misread(tmp_path, capsys):
    asked = [{"question_id": n, "image": "a.jpg", "text": "Is there a dog?", "label": "no"} for n in range(4)]
    said = [
        {"question_id": n, "text": text} for n, text in enumerate(("There isn't one.", "No.", "I don't see any.", "NO"))
    ]
    (tmp_path / "q").write_text(json.dumps(asked))
    (tmp_path / "a").write_text(json.dumps(said))
    for benchmark in ("pope", "r-bench"):
        assert cli.main(["score", benchmark, str(tmp_path / "q"), str(tmp_path / "a"), "--json"]) == 0
        out, err = capsys.readouterr()
        found = json.loads(out)
        figures = found["questions"] if benchmark == "r-bench" else found
        assert figures["accuracy"] == 0.25 and figures["misread"] == 3
        assert "There isn't one.\", which says no, is taken as yes" in err
