"""Is a reply yes or no? Published figures come from scorers that disagree: all are here, and results name theirs.

    scorer       commit                              "no" if and only if
    official     RUCAIBox/POPE@3df3ba1 (and LLaVA)   up to the first ".", without ",": a token is No, no or not
    opera        shikiw/OPERA@61426ef (and PAI)      without "." and ",": a token is No, no, not or NO, or ends in n't
    vcd          DAMO-NLP-SG/VCD@d6568ff             label yes: "yes" is no substring; label no: "no" is a substring
    lmms         lmms-eval 0.7.3                     the whole answer is "no"; the yes-ratio is that of the labels
    vlmevalkit   open-compass/VLMEvalKit@e8e78f0     the word no and not the word yes; neither or both is wrong
    ours         -                                   the first of the words yes and no, in any case, is no; neither is wrong

Worked example: "No." is no, except for lmms, which wants "no"; "I cannot tell" is yes for official and opera, no for vcd
where the label is no, and neither for us.
>>> from typing import get_args
>>> [verdict("No.", "no", scorer) for scorer in get_args(Scorer)]
['no', 'no', 'no', 'unknown', 'no', 'no']
>>> [verdict("I cannot tell", "no", scorer) for scorer in get_args(Scorer)]
['yes', 'yes', 'no', 'unknown', 'unknown', 'unknown']

Here official is POPE's; AMBER, MME and HallusionBench define their own official reading in their own files.
"""

import re

from .choices import Scorer

COMMITS = {
    "opera": "shikiw/OPERA@61426ef",
    "vcd": "DAMO-NLP-SG/VCD@d6568ff",
    "lmms": "lmms-eval 0.7.3",
    "vlmevalkit": "open-compass/VLMEvalKit@e8e78f0",
}
"""The code that each scorer follows; official is the benchmark's."""


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
        first = re.search(r"\b(yes|no)\b", text)
        return first[1] if first else "unknown"
    found = {"yes", "no"} & set(_vlmevalkit_words(reply.lower()))
    return found.pop() if len(found) == 1 else "unknown"


def _vlmevalkit_words(text: str) -> list[str]:
    """VLMEvalKit's process_punctuation, quirk included: a mark next to a space vanishes, others become a space."""
    cleaned = text
    digits = re.search(r"\d,\d", text)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        cleaned = cleaned.replace(mark, "" if digits or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"(?<!\d)\.(?!\d)", "", cleaned, count=32).split()  # it passes re.UNICODE, 32, as the count
