"""vLLM and Hugging Face side by side on picto-llava: the same prompts, greedy, with log-probabilities."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    TORCHDYNAMO_DISABLE="1",  # no compiler for the few functions that vLLM compiles in eager mode too
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlm_fix
from vlm_fix.eval.picto import model_path, scene
from vlm_fix.serving import worker
from vlm_fix.serving.settings import Settings

PATH = str(model_path())
WORDS = 24
KEPT: list[Any] = []  # engines: the end of one would take vLLM's process groups from the others
CAPTION, QUESTION = "Describe the image.", "Is there a {} in the image?"


@dataclass(frozen=True)
class Case:
    """A prompt with the test scenes of the numbers `scenes` (none: text alone)."""

    scenes: tuple[int, ...]
    question: str
    xargs: Any = None

    @property
    def images(self) -> list[Any]:
        return [scene("test", 0, i).image for i in self.scenes]

    def text(self, processor: Any) -> str:
        words = [{"type": "image"}] * len(self.scenes) + [{"type": "text", "text": self.question}]
        return processor.apply_chat_template([{"role": "user", "content": words}], add_generation_prompt=True)


def cases(count: int) -> list[Case]:
    """Captions and questions in turn, about different scenes."""
    asked = [CAPTION, QUESTION.format("dog"), CAPTION, QUESTION.format("car")]
    return [Case((i,), asked[i % 4]) for i in range(count)]


@dataclass
class Answer:
    tokens: list[int]
    logs: list[float] = field(repr=False)  # of the tokens

    def same(self, other: Answer, tolerance: float = 1e-4) -> bool:
        close = all(abs(a - b) <= tolerance for a, b in zip(self.logs, other.logs, strict=True))
        return self.tokens == other.tokens and close


class HuggingFace:
    """generate, prompt by prompt or as a padded batch."""

    def __init__(self, path: str = PATH) -> None:
        self.processor = AutoProcessor.from_pretrained(path)
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()

    def answers(self, spec: Sequence[str], prompts: Sequence[Case], words: int = WORDS, **more: Any) -> list[Answer]:
        if spec:
            vlm_fix.wrap(self.model, list(spec))
        try:
            found: dict[Case, Answer] = {}
            with_image = [c for c in prompts if c.scenes]
            for part in [with_image[i : i + 16] for i in range(0, len(with_image), 16)] + [
                [c] for c in prompts if not c.scenes
            ]:
                found.update(zip(part, self._batch(part, words, **more), strict=True))
            return [found[c] for c in prompts]
        finally:
            vlm_fix.unwrap(self.model)

    def _batch(self, part: Sequence[Case], words: int, **more: Any) -> list[Answer]:
        texts = [c.text(self.processor) for c in part]
        images = {"images": [c.images for c in part]} if part[0].scenes else {}
        inputs = self.processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **images)
        if "token_type_ids" in inputs:  # images that look both ways, which vLLM's CPU backend leaves out
            inputs["token_type_ids"].zero_()
        out = self.model.generate(
            **inputs, max_new_tokens=words, do_sample=False, output_scores=True, return_dict_in_generate=True, **more
        )
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        logs = torch.stack([s.float().log_softmax(-1) for s in out.scores], dim=1)
        answers, end = [], self.model.generation_config.eos_token_id
        for row, log in zip(new, logs, strict=True):
            ends = (row == end).nonzero()
            count = int(ends[0]) + 1 if len(ends) else len(row)
            answers.append(Answer(row[:count].tolist(), log[range(count), row[:count]].tolist()))
        return answers


class Vllm:
    """An engine of vLLM in this process."""

    def __init__(self, spec: str | None, path: str = PATH, **options: Any) -> None:
        from vllm import LLM

        settings = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 384,
            "max_num_seqs": 16,
            "block_size": 32,
            "limit_mm_per_prompt": {"image": 3},
            "additional_config": {"vlm_fix": spec} if spec else {},
        }
        self.llm = LLM(path, **(settings | options))
        KEPT.append(self.llm)
        self.processor = AutoProcessor.from_pretrained(path)

    @property
    def served(self) -> Any:
        found = worker.of(self.llm.llm_engine.vllm_config)
        assert found is not None
        return found

    def use(self, spec: str) -> None:
        """Serve another stack from now on."""
        self.served.use(Settings.read({"vlm_fix": spec}))
        self.llm.llm_engine.reset_encoder_cache()  # images may be pruned in another way
        if self.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching:
            self.llm.reset_prefix_cache()

    def params(self, case: Case, words: int = WORDS, **more: Any) -> Any:
        from vllm import SamplingParams

        extra = None if case.xargs is None else {"vlm_fix": case.xargs}
        return SamplingParams(temperature=0, max_tokens=words, logprobs=0, extra_args=extra, **more)

    def prompt(self, case: Case) -> dict[str, Any]:
        images = {"multi_modal_data": {"image": case.images}} if case.scenes else {}
        return {"prompt": case.text(self.processor), **images}

    def answers(self, prompts: Sequence[Case], words: int = WORDS, **more: Any) -> list[Answer]:
        params = [self.params(c, words, **more) for c in prompts]
        outputs = self.llm.generate([self.prompt(c) for c in prompts], params, use_tqdm=False)
        return [answer_of(o) for o in outputs]

    def staggered(self, prompts: Sequence[Case], every: int, words: int = WORDS) -> list[Answer]:
        """The prompts arrive one by one, `every` steps apart, while earlier ones are answered."""
        engine, done, step = self.llm.llm_engine, {}, 0
        waiting = list(enumerate(prompts))
        while waiting or engine.has_unfinished_requests():
            if waiting and step % every == 0:
                i, case = waiting.pop(0)
                engine.add_request(str(i), self.prompt(case), self.params(case, words))
            for output in engine.step():
                if output.finished:
                    done[int(output.request_id)] = answer_of(output)
            step += 1
        return [done[i] for i in range(len(prompts))]


def answer_of(output: Any) -> Answer:
    one = output.outputs[0]
    tokens = list(one.token_ids)
    return Answer(tokens, [step[token].logprob for step, token in zip(one.logprobs, tokens, strict=True)])


def differences(names: Sequence[Any], mine: Sequence[Answer], theirs: Sequence[Answer]) -> list[str]:
    """What does not agree, in words."""
    found = []
    for name, a, b in zip(names, mine, theirs, strict=True):
        if a.tokens != b.tokens:
            at = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), -1)
            found.append(f"{name}: tokens part at {at} of {len(b.tokens)}")
        elif not a.same(b):
            worst = max(abs(x - y) for x, y in zip(a.logs, b.logs, strict=True))
            found.append(f"{name}: log-probabilities differ by {worst:.1e}")
    return found
