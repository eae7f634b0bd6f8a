"""Rows that hold a conversation: the reply is what the assistant said last.

    batch   {"custom_id": "7", "response": {"body": {"choices": [{"message": {"content": "No."}}]}}}  OpenAI's batches, vLLM's
            run-batch; the body alone, {"choices": [...]}; a response with "error" or status_code 400 is null
    chat    {"messages": [{"role": "user", ...}, {"role": "assistant", "content": "No."}]}, or "conversations" of {"from": "gpt",
            "value": "No."}; the user's last words are the question

>>> flat({"custom_id": "7", "response": {"body": {"choices": [{"message": {"content": "No."}}]}}})
({'custom_id': '7', 'response': 'No.'}, 'batch')
>>> flat({"id": 1, "messages": [{"role": "user", "content": "A dog?"}, {"role": "assistant", "content": "No."}]})
({'id': 1, 'prompt': 'A dog?', 'response': 'No.'}, 'chat')
>>> flat({"id": 1, "text": "No."})
({'id': 1, 'text': 'No.'}, '')
"""

from collections.abc import Mapping
from typing import Any

TURNS = ("messages", "conversations", "conversation")
HELD = (*TURNS, "choices")
"""Lists that are part of a row."""
USERS, ASSISTANTS = ("user", "human"), ("assistant", "gpt", "model")


def flat(row: Any) -> tuple[Any, str]:
    """Return the row with its reply as a text under "response", and the kind of the conversation; ("" if it holds none)."""
    if not isinstance(row, Mapping):
        return row, ""
    whole = row.get("response") if isinstance(row.get("response"), Mapping) else row
    body = whole.get("body", whole) if isinstance(whole, Mapping) else None
    if isinstance(body, Mapping) and isinstance(body.get("choices"), list):
        rest = {key: value for key, value in row.items() if key not in ("response", "choices", "error")}
        if "custom_id" in rest:
            rest.pop("id", None)  # the request's own, which names no question
        return {**rest, "response": _choice(body["choices"])}, "batch"
    if "custom_id" in row and ("error" in row or whole is not row):
        return {"custom_id": row["custom_id"], "response": None}, "batch"
    for name in TURNS:
        turns = row.get(name)
        if isinstance(turns, list) and turns and all(isinstance(turn, Mapping) for turn in turns):
            said = [
                (turn.get("role", turn.get("from")), _text(turn.get("content", turn.get("value")))) for turn in turns
            ]
            if said[-1][0] in ASSISTANTS:
                asked = next((text for who, text in reversed(said) if who in USERS and text), "")
                rest = {key: value for key, value in row.items() if key != name}
                return {**rest, **({"prompt": asked} if asked else {}), "response": said[-1][1]}, "chat"
    return row, ""


def _choice(choices: list[Any]) -> Any:
    """The text of the only choice; all of them, which are no text, if there are several; None if there is none."""
    texts = [
        _text((one.get("message") or {}).get("content", one.get("text"))) for one in choices if isinstance(one, dict)
    ]
    return texts[0] if len(texts) == 1 else texts or None


def _text(content: Any) -> Any:
    """A turn's text, of parts too."""
    if isinstance(content, list):
        return " ".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return content
