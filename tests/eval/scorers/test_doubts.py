"""Files where something else may be the replies are refused, whatever its name; --answer-key decides."""

import doctest
import json

import pytest

from vlm_fix import cli
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.scorers import answers, doubts

PROMPT = "Please describe this image in detail."
ASKED = [f"Is there a {name} in the image?" for name in ("dog", "cat", "car", "cup")]
SAID = ["There is a dog.", "No, there is none.", "yes", "No"]
TRUTH = ["yes", "no", "yes", "no"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_worked_example():
    assert doctest.testmod(doubts).failed == 0


@pytest.mark.parametrize("name", ["reply", "generated", "llm_answer", "Modell sagt", "x1"])
def test_a_column_that_speaks_is_a_candidate_whatever_its_name(name, tmp_path):
    rows = [
        {"question_id": n, "image": "a.jpg", "question": q, "answer": truth, name: said}
        for n, (q, truth, said) in enumerate(zip(ASKED, TRUTH, SAID, strict=True))
    ]
    path = write(tmp_path / "a", rows)
    with pytest.raises(VlmFixError, match=f'both "answer" and "{name}" could be the reply.*--answer-key {name}'):
        answers.read(path, "{}")
    assert [row.reply for row in answers.read(path, "{}", answers.Keys(name)).rows] == SAID
    assert [row.label for row in answers.read(path, "{}", answers.Keys(name)).rows] == TRUTH
    captions = [{"image_id": n, "text": PROMPT, name: said + " A dog."} for n, said in enumerate(SAID)]
    with pytest.raises(VlmFixError, match=f'both "text" and "{name}"'):
        answers.read(write(tmp_path / "c", captions), "{}", images=True)


def test_what_stands_beside_a_reply_is_none(tmp_path):
    beside = {
        "answer_id": "8GzqPD",
        "model_id": "llava-v1.5-7b",
        "metadata": {},
        "object": "dog",
        "attribute": "red",
        "n": 3,
    }
    beside |= {
        "gt_answer_details": "There is a dog at the door.",
        "response_time": "1.2 s",
        "output_path": "a b/c d/e.txt",
    }
    rows = [
        {"question_id": n, "prompt": q, "text": said, **beside}
        for n, (q, said) in enumerate(zip(ASKED, SAID, strict=True))
    ]
    assert [row.reply for row in answers.read(write(tmp_path / "a", rows), "{}").rows] == SAID


@pytest.mark.parametrize("beside", [{"response_time": "1.2 s"}, {"output_path": "x/y.txt"}, {"answer_tokens": "12"}])
def test_a_measurement_is_no_reply(beside, tmp_path):
    rows = [{"image_id": 1, "words of the model": "A dog on a sofa.", **beside}]
    with pytest.raises(VlmFixError, match='no "caption" with a text .*words of the model'):
        answers.read(write(tmp_path / "a", rows), "{}", images=True)


def test_questions_are_no_replies(tmp_path, capsys):
    rows = [{"question_id": n, "image": "a.jpg", "text": q, "label": "yes"} for n, q in enumerate(ASKED)]
    path = write(tmp_path / "q", rows)
    assert cli.main(["score", "pope", path, path]) == 2
    assert "every reply is a question, such as 'Is there a dog" in capsys.readouterr().err
    assert cli.main(["score", "pope", path, path, "--answer-key", "text"]) == 0
    assert "none of the 4 replies holds yes or no" in capsys.readouterr().err


def test_one_prompt_is_no_caption_of_ten_images(tmp_path):
    def rows(text, n):
        return write(tmp_path / "a", [{"image_id": i, "caption": text} for i in range(n)])

    with pytest.raises(
        VlmFixError, match="all 10 captions are 'Please describe this image in detail.'; .*--answer-key caption"
    ):
        answers.read(rows(PROMPT, 10), "{}", images=True)
    assert len(answers.read(rows(PROMPT, 9), "{}", images=True).rows) == 9
    assert len(answers.read(rows("", 10), "{}", images=True).rows) == 10


def test_a_question_in_a_thought_is_none_of_the_reply():
    texts = ["<think>Is there a dog?</think>Yes", "<think>Is there a cat?</think>No"]
    assert not doubts.no_reply(texts, False) and "every reply is a question" in doubts.no_reply(["A?", "B?"], False)
