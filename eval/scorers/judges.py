"""Answers in the input format of benchmarks that a language model judges. No judge is called here: this writes its file.

    judge         format                                                          read by
    mmhal         the template of MMHal-Bench (96 questions) with model_answer    RLHF-V eval/eval_gpt_mmhal.py
    objhal        JSON lines: image_id, question, text                            RLHF-V eval/eval_gpt_obj_halbench.py
    llava-bench   JSON lines: question_id, prompt, text, answer_id, model_id      LLaVA llava/eval/eval_gpt_review_bench.py
    mm-vet        {"v1_0": "...", "v1_1": "...", ...}                             mm-vet_evaluator.py of MM-Vet

Read at RLHF-V/RLHF-V@8daac8a and haotian-liu/LLaVA. The questions are in a template that comes with the benchmark. Answers
are matched with it by id, else by their order: then ids, if there are any, number the rows, or each row repeats its
question. Wherever a row has a question it has to be that of the template. A reply of null becomes "";
objhal leaves it out, as an empty caption has no hallucination.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import read_rows, write_atomic

from . import answers
from .answers import Keys

Row = Mapping[str, Any]
MM_VET_QUESTIONS = 218
MM_VET = re.compile(r"(?:v1_)?(\d+)")


class Judge(NamedTuple):
    """`write` makes the file's text from (question of the template, answer); `ids` are the template's keys of an id.

    Without a template the questions are what the answer file says of itself, unless `template` says that one is needed.
    """

    what: str
    ids: tuple[str, ...]
    template: bool
    write: Callable[[Sequence[tuple[Row, answers.Answer]]], str]
    captions: bool = False  # of which those that failed are left out


def export(
    judge: str,
    path: str,
    out: str,
    template: str | None = None,
    keys: Keys = answers.USUAL,
    tell: answers.Tell = str,
) -> None:
    """Write the answers of `path` to `out` for a judge of JUDGES. Raises VlmFixError if they do not fit the template."""
    made = JUDGES[judge]
    if made.template and not template:
        raise VlmFixError(f"export {judge} fills the benchmark's own file: give it with --template ({made.what}).")
    given = answers.read(path, '{"question_id": 1, "prompt": "...", "text": "..."}', keys)
    tell(given.told("are left out" if made.captions else "become empty texts, which the judge will read as answers"))
    if template:
        rows = read_rows(template, f"template of {judge}")
        pairs = _matched(rows, given, made.ids, template)
    else:
        pairs = [(answer.row, answer) for answer in given.rows]
    if made.captions:
        pairs = [pair for pair in pairs if pair[1].reply is not None]
    if judge == "mm-vet" and len(pairs) != MM_VET_QUESTIONS:
        tell(f"note: {len(pairs)} of MM-Vet's {MM_VET_QUESTIONS} questions are answered")
    write_atomic(Path(out), made.write(pairs))


def _matched(
    template: Sequence[Row], given: answers.Answers, ids: Sequence[str], path: str
) -> list[tuple[Row, answers.Answer]]:
    if len(template) != len(given.rows):
        raise VlmFixError(
            f"{path} has {len(template)} questions and {given.path} {len(given.rows)} answers: give one for each question."
        )
    for key in ids:
        names = [str(row.get(key, "")) for row in template]
        if not all(names):
            continue
        for each in ([answer.id for answer in given.rows], [str(answer.row.get(key, "")) for answer in given.rows]):
            if each == names:
                return [
                    (row, _asked(row, one, given.path, path)) for row, one in zip(template, given.rows, strict=True)
                ]
            by_id = dict(zip(each, given.rows, strict=True))
            if by_id.keys() == {*names} and len(by_id) == len(names):
                return [
                    (row, _asked(row, by_id[name], given.path, path)) for row, name in zip(template, names, strict=True)
                ]
    _check_order(template, given, ids, path)
    return [(row, _asked(row, answer, given.path, path)) for row, answer in zip(template, given.rows, strict=True)]


def _check_order(template: Sequence[Row], given: answers.Answers, ids: Sequence[str], path: str) -> None:
    """Raise VlmFixError for ids that say another order than that of the rows, unless each row repeats its question."""
    said = [answer.id for answer in given.rows]
    theirs = [str(answer.row[key]) for key in ids for answer in given.rows if answer.row.get(key)]
    known = {str(row[key]) for key in ids for row in template if row.get(key)}
    count = range(len(said))
    numbered = said in ([""] * len(said), [str(n) for n in count], [str(n + 1) for n in count])
    repeated = all(answer.question for answer in given.rows)
    if {*said, *theirs} & known or not (numbered or repeated):
        raise VlmFixError(
            f"The ids of {given.path} ({', '.join(said[:3])}, ...) are not those of {path}, once each, nor the numbers of its "
            "rows in order: name the key of the id with --id-key, or add each question, in the order of the template."
        )


def _asked(row: Row, answer: answers.Answer, path: str, template: str) -> answers.Answer:
    asked = _question(row)
    if answer.question and not answers.same_question(asked, answer.question):
        raise VlmFixError(
            f"{path}, row {answer.number} answers {answer.question[:60]!r}, but {template} asks {asked[:60]!r} there: give "
            "the answers in the order of the template, or with its ids."
        )
    return answer


def _once(names: Sequence[Any], pairs: Sequence[tuple[Row, answers.Answer]], what: str) -> None:
    """Raise VlmFixError if a name comes twice: the judge would read one of the two answers."""
    seen: set[Any] = set()
    for name, (_, answer) in zip(names, pairs, strict=True):
        if name in seen:
            raise VlmFixError(f"row {answer.number}: {what} {name!r} comes twice; keep one answer.")
        seen.add(name)


def _question(row: Row) -> str:
    return str(next((row[key] for key in ("question", "prompt", "text", "input") if row.get(key)), ""))


def _mmhal(pairs: Sequence[tuple[Row, answers.Answer]]) -> str:
    needed = ("question", "gt_answer", "image_content")
    for number, (row, _) in enumerate(pairs, 1):
        if lost := [key for key in needed if key not in row]:
            raise VlmFixError(
                f"row {number} of the template has no {lost[0]}: give response_template.json of MMHal-Bench."
            )
    filled = [{**row, "model_answer": (answer.reply or "").strip()} for row, answer in pairs]
    return json.dumps(filled, indent=4, ensure_ascii=False) + "\n"


def _objhal(pairs: Sequence[tuple[Row, answers.Answer]]) -> str:
    rows = []
    for row, answer in pairs:
        image = answers.image_number(row.get("image_id", answer.row.get("image_id", answer.image)))
        asked = _question(row) if row is not answer.row else answer.question
        if image is None or not asked:
            raise VlmFixError(
                f"row {answer.number}: no {'question' if image else 'image_id'}; give Object HalBench's questions "
                "(obj_halbench_300_with_image.jsonl) with --template."
            )
        rows.append({"image_id": image, "question": asked, "text": answer.reply or ""})
    _once([(row["image_id"], row["question"]) for row in rows], pairs, "image and question")
    return _lines(rows)


def _llava_bench(pairs: Sequence[tuple[Row, answers.Answer]]) -> str:
    rows = []
    for row, answer in pairs:
        asked = _question(row) if row is not answer.row else answer.question
        if not asked:
            raise VlmFixError(
                f"row {answer.number}: no question, which the judge reads: add prompt, or give questions.jsonl of LLaVA-Bench "
                "with --template."
            )
        rows.append(
            {
                "question_id": row.get("question_id", answer.id or answer.number),
                "prompt": asked,
                "text": answer.reply or "",
                "answer_id": str(answer.row.get("answer_id", answer.number)),
                "model_id": str(answer.row.get("model_id", "")),
                "metadata": {},
            }
        )
    _once([row["question_id"] for row in rows], pairs, "question_id")
    return _lines(rows)


def _mm_vet(pairs: Sequence[tuple[Row, answers.Answer]]) -> str:
    named = {}
    names = []
    for _, answer in pairs:
        if not (number := MM_VET.fullmatch(answer.id)):
            has = f"the id is {answer.id!r}" if answer.id else "no id"
            raise VlmFixError(f"row {answer.number}: {has}; mm-vet's are v1_0, v1_1, ...: name the key with --id-key.")
        names.append(f"v1_{number[1]}")
        named[names[-1]] = answer.reply or ""
    _once(names, pairs, "id")
    return json.dumps(named, indent=4, ensure_ascii=False) + "\n"


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


JUDGES = {
    "mmhal": Judge("response_template.json of MMHal-Bench", ("image_id", "image_src"), True, _mmhal),
    "objhal": Judge("obj_halbench_300_with_image.jsonl", ("question_id", "image_id"), False, _objhal, True),
    "llava-bench": Judge("questions.jsonl of LLaVA-Bench", ("question_id",), False, _llava_bench),
    "mm-vet": Judge("", ("question_id", "id"), False, _mm_vet),
}
