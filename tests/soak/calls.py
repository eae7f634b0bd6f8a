"""Calls of random methods on one model in one process: memory does not grow, and answers are those of a fresh process."""

from __future__ import annotations

import gc
import json
import random
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlm_fix
from vlm_fix.eval.picto import model_path, scene
from vlm_fix.registry import list_methods

QUESTIONS = ("Describe the image.", "Is there a dog in the image?", "Is there a car in the image?")
MODES: tuple[dict[str, Any], ...] = ({"do_sample": False}, {"do_sample": True, "temperature": 1.2})
GROWTH = 0.02  # of resident memory, after every method was used a few times


@dataclass(frozen=True)
class Call:
    """One call of `generate`, which is all there is to know for making it again."""

    spec: str
    scenes: tuple[int, ...]
    question: str
    mode: int
    words: int
    seed: int


def planned(specs: list[str], calls: int, seed: int) -> list[Call]:
    """Every spec in turn for the warm-up, then random ones; about half are batches of two."""
    rng = random.Random(seed)
    chosen = [*specs, *specs][:calls] + [rng.choice(specs) for _ in range(max(0, calls - 2 * len(specs)))]
    return [
        Call(
            spec,
            tuple(rng.randrange(40) for _ in range(rng.choice((1, 2)))),
            rng.choice(QUESTIONS),
            rng.randrange(len(MODES)),
            rng.choice((2, 4, 8)),
            number,
        )
        for number, spec in enumerate(chosen)
    ]


class Answering:
    """picto-llava, which every call wraps and unwraps."""

    def __init__(self) -> None:
        path = model_path("picto-llava")
        self.processor = AutoProcessor.from_pretrained(path)
        self.model = AutoModelForImageTextToText.from_pretrained(path).eval()

    def specs(self) -> list[str]:
        """The methods that this model takes as they are, and "baseline"; others need a file of the user's."""
        found = []
        for cls in list_methods():
            try:
                with vlm_fix.wrapped(self.model, cls.name):
                    found.append(cls.name)
            except vlm_fix.VlmFixError:
                continue
        return found

    def __call__(self, call: Call) -> list[list[int]] | str:
        """The tokens of each row, or the sentence with which the call is refused (a batch by some methods)."""
        words = [{"type": "image"}, {"type": "text", "text": call.question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": words}], add_generation_prompt=True)
        images = [[scene("test", 0, i).image] for i in call.scenes]
        inputs = self.processor(text=[text] * len(images), images=images, return_tensors="pt")
        torch.manual_seed(call.seed)
        try:
            with warnings.catch_warnings(action="ignore"), vlm_fix.wrapped(self.model, call.spec):
                return self.model.generate(**inputs, max_new_tokens=call.words, **MODES[call.mode]).tolist()
        except vlm_fix.VlmFixError as error:
            return str(error)


def resident() -> float:
    """MB of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def fresh(calls: list[Call]) -> list[Any]:
    """The answers of a process that does only these, the last one first."""
    command = [sys.executable, "-m", "tests.soak", "--again"]
    asked = json.dumps([vars(call) for call in reversed(calls)])
    done = subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])[::-1]


def again(text: str) -> str:
    """What the process of `fresh` prints."""
    answering = Answering()
    asked = [Call(**{**given, "scenes": tuple(given["scenes"])}) for given in json.loads(text)]
    return json.dumps([answering(call) for call in asked])


def soak(calls: int, checked: int, seed: int) -> bool:
    """True if memory stayed and the answers agree."""
    answering = Answering()
    specs = answering.specs()
    plan, answers, memory, began = planned(specs, calls, seed), [], [], time.monotonic()
    for number, call in enumerate(plan):
        answers.append(answering(call))
        if number % 10 == 9:
            memory.append(resident())
        if number % 200 == 199:
            print(f"{number + 1} calls, {time.monotonic() - began:.0f} s, {memory[-1]:.0f} MB", flush=True)
    warm = memory[min(len(memory) - 1, 2 * len(specs) // 10) :]
    tenth = max(1, len(warm) // 10)
    first, last = statistics.median(warm[:tenth]), statistics.median(warm[-tenth:])
    grown = last / first - 1
    sample = sorted(random.Random(seed).sample(range(len(plan)), min(checked, len(plan))))
    theirs = fresh([plan[i] for i in sample])
    other = [plan[i] for i, answer in zip(sample, theirs, strict=True) if answer != answers[i]]
    refused = sum(isinstance(answer, str) for answer in answers)
    print(
        f"{len(plan)} calls of {len(specs)} methods, {refused} of them refused; {first:.0f} MB after the warm-up, {last:.0f} MB "
        f"at the end ({grown:+.2%}); {len(sample) - len(other)} of {len(sample)} answers are those of a fresh process"
    )
    for call in other:
        print(f"differs: {call}")
    return grown < GROWTH and not other
