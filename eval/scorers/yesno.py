"""Is a reply yes or no? Published figures come from scorers that disagree: all are here, and results name theirs.

    scorer       commit                              "no" if and only if
    official     RUCAIBox/POPE@3df3ba1 (and LLaVA)   up to the first ".", without ",": a token is No, no or not
    opera        shikiw/OPERA@61426ef (and PAI)      without "." and ",": a token is No, no, not or NO, or ends in n't
    vcd          DAMO-NLP-SG/VCD@d6568ff             label yes: "yes" is no substring; label no: "no" is a substring
    lmms         lmms-eval 0.7.3                     the whole answer is "no"; the yes-ratio is that of the labels
    vlmevalkit   open-compass/VLMEvalKit@e8e78f0     the word no and not the word yes; neither or both is wrong
    ours         -                                   its plain word is no (`plain.py`); none is wrong

Worked example: "No." is no, except for lmms, which wants "no"; "I cannot tell" is yes for official and opera, no for vcd
where the label is no, and neither for us.
>>> from typing import get_args
>>> [verdict("No.", "no", scorer) for scorer in get_args(Scorer)]
['no', 'no', 'no', 'unknown', 'no', 'no']
>>> [verdict("I cannot tell", "no", scorer) for scorer in get_args(Scorer)]
['yes', 'yes', 'no', 'unknown', 'unknown', 'unknown']

A scorer can take an answer against its plain word: "NO!" is yes for official. `misread` counts such answers.

Here official is POPE's; AMBER, MME and HallusionBench define their own official reading in their own files.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .choices import Scorer
from .plain import plain

COMMITS = {
    "opera": "shikiw/OPERA@61426ef",
    "vcd": "DAMO-NLP-SG/VCD@d6568ff",
    "lmms": "lmms-eval 0.7.3",
    "vlmevalkit": "open-compass/VLMEvalKit@e8e78f0",
}
"""The code that each scorer follows; official is the benchmark's."""


class Misread(NamedTuple):
    """Answers that a scorer takes against their plain word: how many, and the first of them, told in a few words."""

    n: int = 0
    example: str = ""


def misread(
    replies: Sequence[str | None],
    said: Sequence[str],
    read: Callable[[str], str] = plain,
    neither: str = "neither yes nor no",
) -> Misread:
    """Count the replies with a plain yes or no, or what else `read` finds, that a scorer has taken (`said`) for another."""
    wrong = [
        (reply, word, one)
        for reply, one in zip(replies, said, strict=True)
        if reply is not None and (word := read(reply)) not in ("unknown", one)
    ]
    if not wrong:
        return Misread()
    reply, word, one = wrong[0]
    shown = " ".join(reply.split())
    shown = shown if len(shown) <= 60 else f"{shown[:40]} ... {shown[-15:]}"
    return Misread(len(wrong), f'"{shown}", which says {word}, is taken as {one.replace("unknown", neither)}')


def verdict(reply: str | None, label: str, scorer: Scorer) -> str:
    """Read a reply as `scorer` does: yes, no or unknown. None is always unknown; only vcd uses the label."""
    if reply is None:
        return "unknown"
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
        return plain(reply)
    found = {"yes", "no"} & set(_vlmevalkit_words(reply.lower()))
    return found.pop() if len(found) == 1 else "unknown"


def _vlmevalkit_words(text: str) -> list[str]:
    """VLMEvalKit's process_punctuation, quirk included: a mark next to a space vanishes, others become a space."""
    cleaned = text
    digits = re.search(r"\d,\d", text)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        cleaned = cleaned.replace(mark, "" if digits or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"(?<!\d)\.(?!\d)", "", cleaned, count=32).split()  # it passes re.UNICODE, 32, as the count
