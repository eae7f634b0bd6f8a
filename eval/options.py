"""The settings of an evaluation as a file: the options of `vlm-fix eval`, by their names on the command line.

    benchmark: pope
    model: llava-hf/llava-1.5-7b-hf
    method: [pai, hiprune:keep=32+vcd]        a list, or text with commas as on the command line
    data: coco:/data/coco
    batch-size: auto                          underscores do as well
    gen-kwargs: {repetition_penalty: 1.1}

Worked example:
>>> from vlm_fix.eval.settings import Settings
>>> print(to_text(Settings("chair", methods=(("pai",), ("hiprune:keep=32", "vcd")), limit=50)).splitlines()[:4])
['benchmark: chair', 'model: picto-llava', 'method:', '- pai']
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.files import read_text
from vlm_fix.eval.settings import Settings

NAMES = {"methods": "method", "splits": "split"}
"""Settings whose option has another name."""
UNSAID = ("splits", "scorer", "labels", "temperature", "top_p", "device")
"""Settings that are errors where they have no effect, so their usual value is left unsaid."""
ORDER = ("benchmark", "model", "method")


def to_text(settings: Settings) -> str:
    """Return every setting as YAML that `vlm-fix eval --config` reads; None and the usual value of UNSAID are left out."""
    import yaml

    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is not None and not (field.name in UNSAID and value == field.default):
            if field.name == "methods":
                value = ["+".join(stack) for stack in value]
            found[NAMES.get(field.name, field.name).replace("_", "-")] = [*value] if isinstance(value, tuple) else value
    first = {name: found.pop(name) for name in ORDER}
    return yaml.safe_dump({**first, **found}, sort_keys=False, allow_unicode=True)


def read_file(path: str | Path) -> dict[str, Any]:
    """Return option -> value, with underscores as hyphens. Raises VlmFixError for a file that is no mapping of options."""
    import yaml

    try:
        found = yaml.load(read_text(path, "configuration"), _loader(path))
    except VlmFixError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:  # the latter of numbers and dates
        where = getattr(error, "problem_mark", None)
        raise VlmFixError(f"{path} is not YAML{f', line {where.line + 1}' if where else ''}: mend it there.") from None
    if not isinstance(found, dict):
        raise VlmFixError(f"{path} holds no options: write lines such as `model: picto-llava`.")
    return {str(name).replace("_", "-"): value for name, value in found.items()}


def _loader(path: str | Path) -> Any:
    """A safe YAML loader that refuses a name that comes twice, of which YAML itself would take the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [str(self.construct_object(key, deep=True)).replace("_", "-") for key, _ in node.value]
            for place, name in enumerate(names):
                if name in names[:place]:
                    line = node.value[place][0].start_mark.line + 1
                    raise VlmFixError(f"{path}, line {line}: {name} comes twice; give it once.")
            return super().construct_mapping(node, deep)

    return Loader


def key_values(text: str | None, option: str) -> dict[str, Any]:
    """Read "a=1,b=text" or a JSON object; values are JSON where they can be, else text. Raises VlmFixError naming `option`.

    >>> key_values("attn_implementation=sdpa,top_k=5,use_cache=true", "--model-args")
    {'attn_implementation': 'sdpa', 'top_k': 5, 'use_cache': True}
    """
    if not (text := (text or "").strip()):
        return {}
    if text.startswith("{"):
        try:
            return dict(json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, option)))
        except VlmFixError:
            raise
        except (ValueError, TypeError, RecursionError):
            raise VlmFixError(f"{option} {text[:80]!r} is not a JSON object.") from None
    found: list[tuple[str, Any]] = []
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise VlmFixError(f"{option} {text!r}: {part!r} is not NAME=VALUE; write a=1,b=2 or a JSON object.")
        found.append((name.strip(), _value(value.strip())))
    return _once(found, option)


def _once(pairs: list[tuple[str, Any]], option: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise VlmFixError(f"{option} names {name} twice: give it once.")
        found[name] = value
    return found


def _value(text: str) -> Any:
    if text in ("True", "False", "None"):  # as in Python
        return {"True": True, "False": False, "None": None}[text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
