"""POPE: yes/no questions about objects that are, and are not, in an image.

Source: Y. Li et al., Evaluating Object Hallucination in Large Vision-Language Models, EMNLP 2023, arXiv:2305.10355.
Question maker: RUCAIBox/POPE@3df3ba1. Published numbers come from scorers that disagree, so all are here and a result
names the one it used:

    scorer       commit                              "no" if and only if
    official     RUCAIBox/POPE@3df3ba1 (and LLaVA)   up to the first ".", without ",": a token is No, no or not
    opera        shikiw/OPERA@61426ef (and PAI)      without "." and ",": a token is No, no, not or NO, or ends in n't
    vcd          DAMO-NLP-SG/VCD@d6568ff             label yes: "yes" is no substring; label no: "no" is a substring
    lmms         lmms-eval 0.7.3                     the whole answer is "no"; the yes-ratio is that of the labels
    vlmevalkit   open-compass/VLMEvalKit@e8e78f0     the word no and not the word yes; neither or both is wrong
    ours         -                                   the first of the words yes and no, in any case, is no; neither is wrong

Worked example: the answer "No." to a question with label no is a true negative, except for lmms, which wants "no" and
counts it wrong; "I cannot tell" is yes for official and opera, no for vcd where the label is no, and unparsed for us.

A question file has lines like {"question_id": 1, "image": "COCO_val2014_000000310196.jpg",
"text": "Is there a snowboard in the image?", "label": "yes"}.
"""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vlm_fix.errors import VlmFixError

from .rows import DATA, one_of, read_rows
from .stats import Metric, column_sums, harmonic, ratio

Kind = Literal["random", "popular", "adversarial"]
Scorer = Literal["official", "opera", "vcd", "lmms", "vlmevalkit", "ours"]

METRICS: dict[str, Metric] = {
    "accuracy": lambda s: ratio(s["tp"] + s["tn"], s["n"]),
    "precision": lambda s: ratio(s["tp"], s["tp"] + s["fp"]),
    "recall": lambda s: ratio(s["tp"], s["tp"] + s["fn"]),
    "f1": lambda s: harmonic(METRICS["precision"](s), METRICS["recall"](s)),
    "yes_ratio": lambda s: ratio(s["yes"], s["n"]),
}


@dataclass(frozen=True)
class Question:
    """One question; `image` is a file name, `label` "yes" or "no"."""

    question_id: int | str
    image: str
    text: str
    label: str


@dataclass(frozen=True)
class Answer:
    """What the model said, None if it failed to say anything; `prompt` is "" where the file does not hold it."""

    question_id: int | str
    text: str | None
    prompt: str = ""


@dataclass(frozen=True)
class PopeResult:
    """Counts and fractions (0 to 1) of one split. lmms, vlmevalkit and ours can leave tp+fp+tn+fn below n: answers that are
    neither. `unparsed` counts answers with no yes and no no word at all, whatever the scorer makes of them.
    `correct` and `rows` (counts with their image, for `stats.paired_bootstrap`) follow the order of the questions."""

    scorer: str
    n: int
    tp: int
    fp: int
    tn: int
    fn: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    unparsed: int
    questions_sha256: str
    correct: list[bool] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For results.json: everything but the per-question lists."""
        return {name: value for name, value in asdict(self).items() if name not in ("correct", "rows")}


def load_questions(path: str | Path) -> list[Question]:
    """Questions of a POPE file: JSON lines or a JSON array, gzip or not. Raises VlmFixError naming line and key."""
    questions = []
    for number, row in enumerate(read_rows(path, "POPE question file"), 1):
        for key in ("question_id", "image", "text", "label"):
            if key not in row:
                raise VlmFixError(f'{path}, row {number}: no "{key}" in its keys {", ".join(row)}; rename or add it.')
        label = str(row["label"]).strip().lower()
        if label not in ("yes", "no"):
            raise VlmFixError(f'{path}, row {number}: label {row["label"]!r} is neither "yes" nor "no".')
        questions.append(Question(row["question_id"], row["image"], row["text"], label))
    return questions


def coco_questions(kind: Kind) -> list[Question]:
    """The official 3000 questions about 500 val2014 images that come with the package."""
    return load_questions(DATA / f"pope/coco_pope_{one_of(kind, Kind, 'kind')}.jsonl.gz")


def load_answers(path: str | Path) -> list[Answer]:
    """Answers as LLaVA writes them (question_id, prompt, text) or POPE (question, answer; numbered by line then)."""
    answers = []
    for number, row in enumerate(read_rows(path, "answer file"), 1):
        text = row.get("text", row.get("answer"))
        prompt = row.get("prompt", row.get("question", ""))
        if not isinstance(text, str):
            raise VlmFixError(f'{path}, row {number}: no "text" or "answer" with the reply (found: {", ".join(row)}).')
        if "question_id" not in row and not prompt:
            raise VlmFixError(f'{path}, row {number}: neither "question_id" nor "question", so it fits no question.')
        answers.append(Answer(row.get("question_id", number), text, prompt))
    return answers


def make_questions(
    instances: Any, kind: Kind = "random", images: int = 500, per_image: int = 6, seed: int = 0, quirks: bool = False
) -> list[Question]:
    """POPE questions by the official algorithm, on any COCO-format data.

    instances: a COCO instances dictionary, a pycocotools COCO, or a list of (image, object names in order).
    Images with at least per_image/2 objects are kept and `images` of them sampled (one seed gives the same images for
    every kind). Each gets its first per_image/2 objects, and after each a negative, not in the image and not asked
    before: drawn uniformly (random), the most frequent (popular), or the one seen most often with that positive
    (adversarial); the latter two fall back to random. Raises VlmFixError when there are too few images or objects.

    With `quirks` the questions are those of RUCAIBox/POPE@3df3ba1 main.py after random.seed(seed), to the letter: random
    negatives are redrawn until one is free, one stream of random numbers runs through the three kinds, and before a
    vowel the template's every "a" becomes "an" ("Is there an apple in the imange?").
    """
    one_of(kind, Kind, "kind")
    half, rng = per_image // 2, random.Random(seed)
    if half < 1 or per_image % 2:
        raise VlmFixError(f"per_image={per_image}: give an even number, half of the questions are negatives.")
    pool = [(image, objects) for image, objects in _objects(instances) if len(objects) >= half]
    if len(pool) < images:
        raise VlmFixError(f"Only {len(pool)} images have {half} or more objects; ask for images={len(pool)} or fewer.")
    sample = rng.sample(pool, images)
    frequency = Counter(name for _, objects in sample for name in objects)
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for _, objects in sample:
        for name in objects:
            together[name].update(other for other in objects if other != name)
    ranking = {name: [other for other, _ in counts.most_common()] for name, counts in together.items()}
    popular = [name for name, _ in frequency.most_common()]
    kinds: tuple[Kind, ...] = get_args(Kind)
    for each in kinds[: kinds.index(kind) + 1] if quirks else (kind,):  # the stream has passed the kinds before
        questions: list[Question] = []
        for image, objects in sample:
            free = dict.fromkeys(name for name in frequency if name not in objects)
            for positive in objects[:half]:
                ranked = {"random": [], "popular": popular, "adversarial": ranking[positive]}[each]
                negative = next((name for name in ranked if name in free), "")
                if not negative:
                    if not free:
                        raise VlmFixError(
                            f"{image} shows all but {half - 1} or fewer of the objects: no negative is left."
                        )
                    names = list(frequency if quirks else free)
                    while (negative := rng.choice(names)) not in free:
                        pass
                del free[negative]
                for name, label in ((positive, "yes"), (negative, "no")):
                    text = question_text(name)
                    if quirks and text.startswith("Is there an "):
                        text = text.replace("image", "imange")
                    questions.append(Question(len(questions) + 1, image, text, label))
    return questions


def question_text(name: str) -> str:
    """The official template with its article; as in the published files, not "imange" as the script would write."""
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def score(questions: Sequence[Question], answers: Sequence[Answer], scorer: Scorer = "official") -> PopeResult:
    """Score answers, matched by question_id, exactly as `scorer` does. Raises VlmFixError when they do not line up.

    An answer of None (the model failed) is wrong under every scorer: neither yes nor no, unparsed, and a miss (FN) where
    the object is there.
    """
    one_of(scorer, Scorer, "scorer")
    replies = _aligned(questions, answers)
    rows: list[dict[str, Any]] = []
    for question, reply in zip(questions, replies, strict=True):
        said = "failed" if reply is None else verdict(reply, question.label, scorer)
        yes = question.label == "yes"
        row = {"tp": yes and said == "yes", "fp": not yes and said == "yes", "tn": not yes and said == "no"}
        # VLMEvalKit's recall is over all positives: an unknown answer is a miss there, and no answer for lmms-eval
        row["fn"] = yes and (said in ("no", "failed") or (scorer in ("vlmevalkit", "ours") and said == "unknown"))
        row["yes"] = yes if scorer == "lmms" else said == "yes"
        rows.append({"image": question.image, "n": 1} | {name: int(value) for name, value in row.items()})
    sums = column_sums(rows, ["n", "tp", "fp", "tn", "fn", "yes"])
    figures: dict[str, Any] = {name: int(sums[name]) for name in ("n", "tp", "fp", "tn", "fn")}
    figures |= {name: float(metric(sums)) for name, metric in METRICS.items()}
    return PopeResult(
        scorer=scorer,
        **figures,
        unparsed=sum(not re.search(r"\b(yes|no|not)\b|n['’]t\b", (reply or "").lower()) for reply in replies),
        questions_sha256=questions_sha256(questions),
        correct=[bool(row["tp"] or row["tn"]) for row in rows],
        rows=rows,
    )


def verdict(reply: str, label: str, scorer: Scorer) -> str:
    """How `scorer` reads a reply: yes, no or unknown (only vcd looks at the label)."""
    if scorer == "official":
        words = reply.split(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "no", "not"} & set(words) else "yes"
    if scorer == "opera":
        words = reply.replace(".", "").replace(",", "").split(" ")
        return "no" if {"No", "no", "not", "NO"} & set(words) or any(w.endswith("n't") for w in words) else "yes"
    text = reply.lower().strip()
    if scorer == "vcd":
        return ("yes" if "yes" in text else "no") if label == "yes" else ("no" if "no" in text else "yes")
    if scorer == "lmms":
        return text if text in ("yes", "no") else "unknown"
    if scorer == "ours":
        first = re.search(r"\b(yes|no)\b", text)
        return first[1] if first else "unknown"
    found = {"yes", "no"} & set(_vlmevalkit_words(reply.lower()))
    return found.pop() if len(found) == 1 else "unknown"


def questions_sha256(questions: Iterable[Question]) -> str:
    """Hash of the questions as JSON lines: for the official files, that of the file itself with "\\n" line ends."""
    return hashlib.sha256("".join(json.dumps(asdict(q)) + "\n" for q in questions).encode()).hexdigest()


def _aligned(questions: Sequence[Question], answers: Sequence[Answer]) -> list[str | None]:
    """The reply to each question."""
    if not questions or not answers:
        raise VlmFixError(f"There are no {'answers' if questions else 'questions'} to score.")
    by_id = {answer.question_id: answer for answer in answers}
    mismatch = next((q for q in questions if q.question_id not in by_id), None)
    if mismatch or not len(by_id) == len(answers) == len(questions):
        known = {q.question_id for q in questions}
        first = mismatch.question_id if mismatch else next((i for i in by_id if i not in known), "(one twice)")
        raise VlmFixError(
            f"Questions and answers do not line up: {len(questions)} questions, {len(answers)} answers, first mismatch "
            f"at question_id {first!r}; give the question file that these answers were made from."
        )
    for question in questions:
        prompt = by_id[question.question_id].prompt
        # "imange": a typo of old question files; a prompt may hold more, such as "Please answer with one word."
        if prompt and question.text.replace("imange", "image") not in prompt.replace("imange", "image"):
            raise VlmFixError(
                f"Questions and answers do not line up: question_id {question.question_id!r} asks {question.text!r} "
                f"but its answer is to {prompt!r}; give the question file that these answers were made from."
            )
    return [by_id[question.question_id].text for question in questions]


def _objects(instances: Any) -> list[tuple[str, list[str]]]:
    """(file name, its object names without repeats, in the order of the annotations)."""
    if isinstance(instances, Sequence):
        return [(image, list(dict.fromkeys(names))) for image, names in instances]
    data = getattr(instances, "dataset", instances)  # a pycocotools COCO holds the dictionary there
    names = {category["id"]: category["name"] for category in data["categories"]}
    found: dict[int, dict[str, None]] = {image["id"]: {} for image in data["images"]}
    for annotation in data["annotations"]:
        found[annotation["image_id"]][names[annotation["category_id"]]] = None
    return [(image["file_name"], list(found[image["id"]])) for image in data["images"]]


def _vlmevalkit_words(text: str) -> list[str]:
    """process_punctuation of VLMEvalKit, with its quirk: a mark next to a space vanishes, any other becomes a space."""
    cleaned = text
    digits = re.search(r"\d,\d", text)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        cleaned = cleaned.replace(mark, "" if digits or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"(?<!\d)\.(?!\d)", "", cleaned, count=32).split()  # it passes re.UNICODE, 32, as the count
