"""Answers as people have them: one reader for all benchmarks. `files.read_table` says which file formats it takes.

    layout          rows                                               reply, id
    plain           one reply among REPLIES or `response_*`            that key; question_id, id, ... (image_id, image, ...)
    LLaVA           question_id, prompt, text                          text, question_id
    POPE's README   question, answer                                   answer, the number of the row
    lmms-eval       doc_id, filtered_resps, and a dictionary for       filtered_resps; question_id or image_id of that
                    each metric (samples_*.jsonl)                      dictionary
    VLMEvalKit      index, question, answer (the truth), prediction    prediction, index
    CHAIR           {"imgToEval": {id: {...}}}, {"sentences": [...]}   as in plain rows
    id to reply     {"42": "A dog."}                                   the value, the name
    batch, chat     rows of OpenAI's batches and conversations         see `chats.py`
    columns         {"question_id": [1, 2], "text": ["No", "Yes"]}, or  as in plain rows
                    pandas' {"text": {"0": "No", "1": "Yes"}}

A row that offers two candidates for the reply or for the id is an error, unless they say the same, as is a file whose
replies may be elsewhere (`doubts.py`): nothing is guessed, the options --answer-key and --id-key decide. A reply of null
(or an empty cell of a table, which may be either) is an answer that failed. An empty text is an answer, as official scripts take
it: POPE's reads yes, Reefknot's no, and an empty caption has no hallucination. How many there are of both is told.

>>> image_number("COCO_val2014_000000391895.jpg"), image_number("391895"), image_number("COCO_val2014_000000391895_25")
(391895, 391895, None)
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import counted, read_table

from . import chats, doubts

REPLIES = (
    *("caption", "text", "answer", "response", "prediction", "output", "pred", "completion", "generated_text"),
    *("generated_caption", "model_answer", "model_response", "model_output", "model_prediction", "predicted_answer"),
    *("reply", "generated", "generation", "model_reply", "ans", "outputs", "result", "pred_answer", "llm_answer"),
    *("gen", "out"),
)
MANY = ("response_", "answer_", "output_", "prediction_")
"""A key that begins so is a reply of the model that the rest names, but for those like NO_REPLY."""
NO_REPLY = re.compile(
    r".*_(?:id|idx|index|key|type|time|path|file|dir|url|date|length|len|tokens|model|name|lang|format|prob|score|s|ms|seconds)"
)
IDS = ("question_id", "id", "qid", "index", "sample_id", "custom_id")
IMAGE_IDS = ("image_id", "image", "image_name", "image_path", "file_name", "filename", *IDS)
QUESTIONS = ("prompt", "question", "query", "instruction")
LABELS = ("label", "gt_answer", "ground_truth", "gt", "truth", "target")
IMAGES = ("image", "image_path", "image_name", "file_name", "filename", "image_source", "image_id")
CATEGORIES = ("category", "task", "split", "type", "subset")
COCO_NAME = re.compile(
    r"(?:(?:COCO_(?:train|val|test)20\d\d_)?([0-9]{12})|([0-9]{1,18}))(?:\.(?:jpe?g|png))?", re.IGNORECASE
)
FLOAT = re.compile(r"[0-9]{1,18}\.0+")
LISTS = ("imgToEval", "sentences")


Tell: TypeAlias = Callable[[str], object]
"""Gets each line about what was read; `str` drops it."""


class Answer(NamedTuple):
    """One row: its number in the file, its id, the reply (None: it failed), and what else the row says ("" if nothing)."""

    number: int
    id: str
    reply: str | None
    question: str
    label: str
    image: str
    category: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Answers:
    """The answers of a file; `form` is its format, `layout` what its rows are, `keys` where reply and id were found."""

    path: str
    form: str
    layout: str
    keys: tuple[str, str]
    rows: list[Answer]

    def told(self, lost_ones: str = "count as failed") -> str:
        """Say what was read, and as what."""
        lost = sum(answer.reply is None for answer in self.rows)
        where = f"reply in {self.keys[0]}, id in {self.keys[1] or 'no key, so the number of the row'}"
        empty = sum(answer.reply is not None and not answer.reply.strip() for answer in self.rows)
        failed = f"; {lost} of them null, which {lost_ones}" if lost else ""
        failed += f"; {empty} of them empty texts, which count as answers" if empty else ""
        return (
            f"read {counted(len(self.rows), 'answer')} from {self.path}: {self.form}, {self.layout} ({where}){failed}"
        )


@dataclass(frozen=True)
class Keys:
    """What --answer-key and --id-key name, if anything."""

    answer: str | None = None
    id: str | None = None


USUAL = Keys()


def read(
    path: str | Path,
    example: str,
    keys: Keys = USUAL,
    images: bool = False,
    numbers: bool = False,
    sparse: bool = False,
    what: str = "answer file",
) -> Answers:
    """Read an answer file. Ids are texts; with `images` they are the numbers of COCO's images.

    With `numbers` a reply may be a whole number, such as a judge's mark; with `sparse` rows without a reply are questions
    that were not asked, and are left out.

    Raises VlmFixError naming row and key: for a row without a reply or with two, without an id (only `images`) or with two
    that differ, and for an id that names no image. `example` is a good row, for the error of a file of another kind.
    """
    table = read_table(path, what, example)
    rows, layout = _rows(table.rows, table.form, path)
    if layout == "plain" and not keys.answer and (flat := [chats.flat(row) for row in rows]) and flat[0][1]:
        rows, layout = [row for row, _ in flat], flat[0][1]
    found: list[Answer] = []
    used: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for number, row in enumerate(rows, 1):
        reader = _Row(path, number, row, keys, images, numbers)
        if sparse and not reader.replies():
            continue
        answer = reader.answer(layout)
        found.append(answer)
        used[0][reader.reply_key], used[1][reader.id_key] = None, None
    if not found:
        raise VlmFixError(f"{path} has no answers: no row has a reply; name its key with --answer-key.")
    if not keys.answer and layout != "lmms-eval":
        _no_doubt(path, found, [*used[0]], layout, images)
    if layout == "plain" and {"question_id", "prompt"} <= rows[0].keys() and "text" in used[0]:
        layout = "LLaVA"
    if layout == "plain" and not any(used[1]) and "question" in rows[0]:
        layout = "POPE's README"
    named = {
        "plain": "plain rows",
        "LLaVA": "LLaVA's rows",
        "batch": "rows of OpenAI's batches",
        "chat": "conversations",
        "list": "rows in a list",
    }.get(layout, f"rows of {layout}")
    first, second = (" or ".join(filter(None, names)) for names in used)
    return Answers(str(path), table.form, named, (first, second), found)


def _no_doubt(path: Any, found: Sequence[Answer], names: Sequence[str], layout: str, images: bool) -> None:
    """Raise VlmFixError if something else may be the replies; `doubts.py` says when."""
    rows = [answer.row for answer in found]
    known = {*names, *REPLIES, *IMAGE_IDS, *IMAGES, *QUESTIONS, *LABELS, *CATEGORIES}
    other = "" if layout == "VLMEvalKit" else doubts.other_column(rows, known)
    if other:
        raise VlmFixError(
            f'{path}: both "{names[0]}" and "{other}" could be the reply; say which with --answer-key, such as --answer-key '
            f"{other}."
        )
    if why := doubts.no_reply([answer.reply for answer in found], images):
        raise VlmFixError(
            f'{path}: {why}; name the reply with --answer-key, or if it is in "{names[0]}" indeed, give --answer-key {names[0]}.'
        )


def same_question(asked: str, prompt: str) -> bool:
    """Whether a prompt holds a question, but for case, spaces and the typo "imange" of old question files."""
    return plain_text(asked) in plain_text(prompt)


def plain_text(text: str) -> str:
    """Return a text in lower case with single spaces."""
    return " ".join(text.lower().replace("imange", "image").split())


def _rows(rows: list[dict[str, Any]], form: str, path: Any) -> tuple[list[dict[str, Any]], str]:
    """Unpack a JSON object and name the layout of the rows."""
    whole = rows[0]
    if form == "one JSON object" and (table := _columns(whole)):
        return table, "plain"
    if form == "one JSON object" and not _candidates(whole, REPLIES):
        lists = [name for name in LISTS if isinstance(whole.get(name), list | dict)]
        lists = lists or [name for name, value in whole.items() if _is_list_of_rows(value) and name not in chats.HELD]
        if len(lists) > 1:
            raise VlmFixError(f"{path} holds the lists {' and '.join(lists)}: keep the one with the answers.")
        if lists:
            held = whole[lists[0]]
            named = isinstance(held, dict)
            return ([_named(*each) for each in held.items()] if named else list(held)), f'CHAIR, "{lists[0]}"' if lists[
                0
            ] in LISTS else "list"
        if all(isinstance(value, dict) for value in whole.values()):
            return [_named(*each) for each in whole.items()], "id to row"
        row = whole.keys() & {*IMAGE_IDS, *QUESTIONS, *CATEGORIES, *LABELS}
        if not row and all(value is None or isinstance(_one(value), str) for value in whole.values()):
            return [{"id": name, "answer": value} for name, value in whole.items()], "id to reply"
    keys = whole.keys()
    if {"doc_id", "filtered_resps"} <= keys:
        return sorted(rows, key=lambda row: _number(row.get("doc_id"))), "lmms-eval"
    return rows, "VLMEvalKit" if {"index", "prediction"} <= keys else "plain"


def _columns(whole: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an object that holds a table by its columns, one of them a reply; [] if it does not."""
    columns = {
        name: dict(enumerate(each)) if isinstance(each, list) else each if isinstance(each, dict) else {}
        for name, each in whole.items()
    }
    index = [*next(iter(columns.values()), ())]
    if not index or any([*each] != index for each in columns.values()) or not {*REPLIES} & {*columns}:
        return []
    rows = [{name: each[place] for name, each in columns.items()} for place in index]
    counted = [str(place) for place in index] == [str(n) for n in range(len(index))]
    return rows if counted else [_named(place, row) for place, row in zip(index, rows, strict=True)]


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _named(name: str, row: Any) -> dict[str, Any]:
    row = row if isinstance(row, dict) else {"answer": row}
    return row if any(key in row for key in IMAGE_IDS) else {"id": name, **row}


def _number(value: Any) -> int:
    return whole_number(str(value)) or 0


def _candidates(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    found = [name for name in names if name in row]
    if names is REPLIES:
        found += [key for key in row if key.startswith(MANY) and not NO_REPLY.fullmatch(key) and _is_reply(row[key])]
    return found


def _is_reply(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _one(value: Any) -> Any:
    """A value, or what is alone in a list."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value


def _is_nothing(value: Any) -> bool:
    return value is None or value != value  # pandas writes a missing text as NaN


class _Row:
    """Reads one row."""

    def __init__(self, path: Any, number: int, row: Any, keys: Keys, images: bool, numbers: bool):
        self.place, self.number, self.keys = f"{path}, row {number}", number, keys
        self.images, self.numbers = images, numbers
        if not isinstance(row, dict):
            raise VlmFixError(f"{self.place}: not a row with names but {str(row)[:40]!r}.")
        self.row: dict[str, Any] = row
        self.reply_key = self.id_key = ""

    def replies(self) -> list[str]:
        """Return the keys that could be the reply."""
        names = [self.keys.answer] if self.keys.answer else [*_candidates(self.row, REPLIES), "filtered_resps"]
        return [name for name in names if name in self.row]

    def answer(self, layout: str) -> Answer:
        """Return the row's answer."""
        if layout == "lmms-eval":
            return self._of_lmms()
        kit = layout == "VLMEvalKit" and not self.keys.answer
        self.reply_key = "prediction" if kit else self._reply_key()
        reply = self._text(self.row.get(self.reply_key))
        labels = ("answer", *LABELS) if kit else (*LABELS, "answer") if self.keys.answer else LABELS
        id = self._id(self.row, self.keys.id)
        return self._made(id, reply, labels)

    def _of_lmms(self) -> Answer:
        """The reply after lmms-eval's filters; the metrics' dictionary has the question's id, and all of HallusionBench."""
        about = next((v for v in self.row.values() if isinstance(v, dict) and {*v} & {*IDS, "image_id", "set_id"}), {})
        flat = {**about, "doc_id": self.row["doc_id"]}
        flat = {key: value for key, value in flat.items() if isinstance(value, str | int | float)}
        self.reply_key = self.keys.answer or "filtered_resps"
        reply = self._text(self.row.get(self.reply_key))
        ids = {name: value for name, value in flat.items() if name in IMAGE_IDS}
        id = self._id(ids or {"id": self.row["doc_id"]}, self.keys.id)
        self.row = {**flat, "question": self.row.get("input", ""), "label": self.row.get("target", "")}
        return self._made(id, reply, LABELS)

    def _made(self, id: str, reply: str | None, labels: Sequence[str]) -> Answer:
        question, label, image, category = map(self._first, (QUESTIONS, labels, IMAGES, CATEGORIES))
        return Answer(self.number, id, reply, question, label, image, category, self.row)

    def _reply_key(self) -> str:
        if self.keys.answer:
            if self.keys.answer not in self.row:
                raise VlmFixError(
                    f'{self.place}: no "{self.keys.answer}" ({self._keys()}); give one of these as --answer-key.'
                )
            return self.keys.answer
        found = _candidates(self.row, REPLIES)
        if len(found) > 1:
            raise VlmFixError(
                f'{self.place}: both "{found[0]}" and "{found[1]}" could be the reply; say which with --answer-key, such as '
                f"--answer-key {found[1]}."
            )
        if not found:
            usual = '"caption"' if self.images else '"text" or "answer"'
            raise VlmFixError(
                f"{self.place}: no {usual} with a text ({self._keys()}); name the reply with --answer-key."
            )
        return found[0]

    def _text(self, value: Any) -> str | None:
        value = _one(value)
        if (
            self.numbers
            and (isinstance(value, int | float) or FLOAT.fullmatch(str(value)))
            and float(value) in range(10)
        ):
            return str(int(float(value)))
        if _is_nothing(value) or isinstance(value, str):
            return value if isinstance(value, str) else None
        raise VlmFixError(
            f'{self.place}: the reply in "{self.reply_key}" is {str(value)[:40]}, not a text: write it as one, or name '
            "another key with --answer-key."
        )

    def _id(self, row: Mapping[str, Any], key: str | None) -> str:
        """The id as text; "" if the row has none and needs none."""
        if key and key not in row:
            raise VlmFixError(f'{self.place}: no "{key}" ({self._keys()}); give one of these as --id-key.')
        names = [key] if key else [name for name in (IMAGE_IDS if self.images else IDS) if name in row]
        given = {name: row[name] for name in names if not _is_nothing(row[name]) and name != self.reply_key}
        read: Callable[[Any], Any] = image_number if self.images else id_text
        found = {name: read(value) for name, value in given.items()}
        known = {name: value for name, value in found.items() if value is not None}
        if len({*known.values()}) > 1:
            a = next(iter(known))
            b = next(name for name, value in known.items() if value != known[a])
            raise VlmFixError(
                f'{self.place}: both "{a}" ({known[a]}) and "{b}" ({known[b]}) could be the id; say which with --id-key, such '
                f"as --id-key {a}."
            )
        if known:
            self.id_key = next(iter(known))
            return str(known[self.id_key])
        if given:
            name, value = next(iter(given.items()))
            kind = "a number, or a COCO name with 12 digits" if self.images else "a number or a text"
            raise VlmFixError(
                f'{self.place}: "{name}" is {value!r}, which is no id of {"an image" * self.images or "a question"}: {kind}.'
            )
        if self.images:
            raise VlmFixError(f'{self.place}: no "image_id" with a number ({self._keys()}); name the id with --id-key.')
        return ""

    def _first(self, names: Sequence[str]) -> str:
        return first(self.row, [name for name in names if name != self.reply_key])

    def _keys(self) -> str:
        return f"its keys are {', '.join(self.row)}"


def first(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first value of a row under one of the names, as text; "" if it has none, or one that is neither text nor number."""
    value = next((row[name] for name in names if name in row and not _is_nothing(row[name])), "")
    return str(value) if isinstance(value, str | int | float) else ""


def id_text(value: Any) -> str | None:
    """An id as text; a whole number is written without ".0", as tables of pandas have it. None if it is no id."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else str(value)
    text = str(value).strip()
    return text.partition(".")[0] if FLOAT.fullmatch(text) else text


def whole_number(text: str) -> int | None:
    """The number that a text of at most 18 digits stands for, else None."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def image_number(value: Any) -> int | None:
    """The number of an image: a whole number, or the 12 digits of a COCO name. Other digits in a name are no id."""
    text = id_text(value)
    match = COCO_NAME.fullmatch(text.replace("\\", "/").rpartition("/")[2]) if text else None
    return int(match[1] or match[2]) if match else None
