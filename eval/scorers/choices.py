"""The choices that scorers offer, for type checkers, error messages and the command line alike."""

from typing import Any, Literal, get_args

from vlm_fix.errors import VlmFixError

Scorer = Literal["official", "opera", "vcd", "lmms", "vlmevalkit", "ours"]
"""How a yes/no answer is read, see `yesno.py`."""
Variant = Literal["nltk", "pattern"]
"""How the words of a caption are read, see `chair/words.py`."""

Labels = Literal["both", "pope", "repope"]
"""Whose labels of POPE's questions: POPE's, RePOPE's, or, where RePOPE has them, both."""


def one_of(value: str, choices: Any, what: str) -> str:
    """Return `value` if the Literal type `choices` lists it, else raise VlmFixError."""
    if value not in get_args(choices):
        raise VlmFixError(f"Unknown {what} {value!r}; choose one of {', '.join(get_args(choices))}.")
    return value
