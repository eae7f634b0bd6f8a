"""What a server was asked for: the stack of methods, and the model it is planned for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlm_fix.errors import VlmFixError
from vlm_fix.method import Method
from vlm_fix.registry import parse, split_methods

KEY = "vlm_fix"  # in vLLM's additional_config, and of a request
EXAMPLES = '"pai:alpha=0.3", ["hiprune:keep=32", "pai"] or {"method": "iri", "calibration": "iri.json"}'


@dataclass(frozen=True)
class Settings:
    """The stack of a server, as specs, and the calibration files that fill it."""

    methods: tuple[str, ...]
    calibration: tuple[str, ...] = ()

    @classmethod
    def read(cls, additional: Any) -> Settings | None:
        """From vLLM's additional_config; None where it asks for no method. Raises VlmFixError for what cannot be read."""
        if not isinstance(additional, Mapping):
            return None
        for name in additional:
            if name != KEY and str(name).lower().replace("-", "").replace("_", "") == "vlmfix":
                raise VlmFixError(f"additional_config has {name!r}, which nobody reads: write {KEY!r}.")
        value = additional.get(KEY)
        if value is None:
            return None
        given = dict(value) if isinstance(value, Mapping) else {"method": value}
        methods, files = given.pop("method", None), given.pop("calibration", ())
        methods = split_methods(methods) if isinstance(methods, str) else [methods]
        files = [files] if isinstance(files, str) else files
        if isinstance(value, str) and len(methods) > 1:
            stack = "+".join("+".join(run) for run in methods)
            raise VlmFixError(f"{value!r} is {len(methods)} runs, and a server has one stack: write {stack!r}.")
        if given or len(methods) != 1 or not _texts(methods[0]) or not methods[0] or not _texts(files):
            raise VlmFixError(f"additional_config[{KEY!r}] is {value!r}: give one stack, such as {EXAMPLES}.")
        return cls(tuple(methods[0]), tuple(files))

    def parsed(self) -> list[Method]:
        """The methods; VlmFixError for an unknown name or a bad value."""
        return parse(list(self.methods))


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


@functools.lru_cache(maxsize=4)
def skeleton(path: str, revision: str | None, trust: bool) -> Any:
    """The Hugging Face model of a checkpoint without its weights: methods read their defaults and refusals from it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", trust_remote_code=trust)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise VlmFixError(
            f"vlm-fix serves vision-language models of transformers, and {path} is none: {reason}"
        ) from error
    model.name_or_path = model.config.name_or_path = path
    return model
