"""Answers that a scorer takes against their plain word are counted, for every scorer and benchmark."""

import json

import pytest

from tests.support.answer_files import hallusion_rows, lines, mme_rows
from vlm_fix import cli
from vlm_fix.eval.scorers import reefknot, yesno
from vlm_fix.eval.scorers.amber import data as amber_data

REPLIES = [
    "YES",
    "**No**",
    "<think>Is there a dog? Yes, perhaps.</think>\nNo.",
    "是的",
    "没有。",
    "Non.",
    "NO!",
    "Yes",
    "A dog.",
]
PLAIN = ["yes", "no", "no", "yes", "no", "no", "no", "yes", "unknown"]


@pytest.mark.parametrize("scorer", ["official", "opera", "vcd", "lmms", "vlmevalkit", "ours"])
def test_misread_answers_are_counted_for_every_scorer(scorer):
    said = [yesno.verdict(reply, "no", scorer) for reply in REPLIES]
    wrong = [r for r, one, plain in zip(REPLIES, said, PLAIN, strict=True) if plain not in ("unknown", one)]
    found = yesno.misread([*REPLIES, None], [*said, "unknown"])
    assert found.n == len(wrong) and (scorer == "ours") == (not wrong)
    if wrong:
        assert found.example.startswith(f'"{wrong[0][:10]}')
    assert [yesno.plain(reply) for reply in REPLIES] == PLAIN


@pytest.mark.parametrize("benchmark", ["pope", "amber", "mme", "hallusion"])
def test_the_command_says_how_many_are_misread_and_what_reads_them(benchmark, tmp_path, capsys):
    if benchmark == "pope":
        rows = [{"question_id": i, "image": "a.jpg", "text": "A dog?", "label": "no"} for i in (1, 2)]
        given = ["NO!", "No"]
        where = [
            lines(tmp_path / "q", rows),
            lines(tmp_path / "a", [{"id": i + 1, "text": t} for i, t in enumerate(given)]),
        ]
    elif benchmark == "amber":
        asked_ = [q for q in amber_data.questions() if q.kind == "relation"]
        where = [lines(tmp_path / "a", [{"id": q.id, "response": "No" if n else "no."} for n, q in enumerate(asked_)])]
    elif benchmark == "mme":
        rows = mme_rows(lambda t, i, q, l, r: {"category": t, "image": i, "question": q, "label": l, "response": r})
        rows[0]["response"] = "**Yes**, there is"
        rows[0]["response"] = "<b>Answer</b>: Yes"
        where = [lines(tmp_path / "a", rows)]
    else:
        rows = [{**row, "model_prediction": "No" if n else "Nein"} for n, row in enumerate(hallusion_rows())]
        where = [lines(tmp_path / "a", rows)]
    assert cli.main(["score", benchmark, *where, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    parts = [found] if benchmark == "pope" else list(found.values())
    assert max(part["misread"] for part in parts) == 1
    notes = [line for line in err.splitlines() if "takes 1 answer against its plain word: " in line]
    assert notes and all(line.endswith("; --scorer ours reads it") for line in notes)
    assert cli.main(["score", benchmark, *where, "--scorer", "ours"]) == 0
    assert "plain word" not in capsys.readouterr().err


def test_letters_that_are_taken_for_others_are_counted():
    said = ["B", "b.", "Answer: D", "**B**", "(C) in", "A or B", None, "The dog is at the sign"]
    asked = [reefknot.Question(str(i), "1", "?", "choice", "perception", "B") for i in range(len(said))]
    found = reefknot.score(said, asked)["perception"]
    assert (found.figures["accuracy"], found.unparsed) == (0.25, 4)
    assert found.misread.n == 3
    assert found.misread.example == '"Answer: D", which says D, is taken as A'
    ours = reefknot.score(said, asked, "ours")["perception"]
    assert ours.misread.n == 0
