"""The model of an evaluation inside vLLM: `--engine vllm`.

Each run starts an engine of its own with its methods, prompts are queued batch by batch, and all else (tasks, batches,
seeds, store, scorers) is as with `generate`. First token: that of the batch's first request, by vLLM's clock.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vlm_fix.calibrated import Calibration, apply, weights_id
from vlm_fix.errors import VlmFixError
from vlm_fix.families import arch_of
from vlm_fix.method import Baseline, Method
from vlm_fix.serving import refusals
from vlm_fix.serving.engine import ServedEngine
from vlm_fix.serving.settings import skeleton


class ServedModel:
    """Stands where the loaded model stands: what `plan` and the runner read of it, and the answers of a batch."""

    def __init__(self, path: str, dtype: str, device: str) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise VlmFixError("--engine vllm: vLLM is not installed: pip install 'vlm-fix[vllm]'.")
        self.path, self.bare = path, skeleton(path, None, False)
        self.device = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
        self.dtype_name = "float32" if dtype == "auto" and self.device.type == "cpu" else dtype  # as `load_model` does
        self.engine: Any = None
        self.running: tuple[str, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bare, name)

    def identity(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "type": self.bare.config.model_type,
            "parameters": sum(p.numel() for p in self.bare.parameters()),
            "weights": weights_id(self.bare),
            "dtype": self.dtype_name,
            "device": self.device.type,
            "engine": "vllm",
        }

    @contextlib.contextmanager
    def applied(self, stack: Sequence[Method], calibration: Sequence[Calibration]) -> Iterator[None]:
        """Answer with these methods. Raises VlmFixError for what cannot be served; vLLM starts with the first batch."""
        methods = [m for m in stack if not isinstance(m, Baseline)]
        filled = apply(calibration, methods, arch_of(self.bare)) if methods else []
        refusals.check_engine(ServedEngine(self.bare, filled))
        self.running = tuple(m.spec() for m in filled)
        try:
            yield
        finally:
            self.running, self.engine = None, None
            gc.collect()

    def start(self) -> Any:
        """The engine of the run."""
        if self.engine is None:
            from vllm import LLM

            additional = {"vlm_fix": list(self.running)} if self.running else {}
            self.engine = LLM(
                self.path,
                dtype=self.dtype_name,
                additional_config=additional,
                enforce_eager=self.device.type == "cpu",
                enable_prefix_caching=False,  # batches then cost the same in any order
                max_model_len=min(4096, self.bare.config.get_text_config().max_position_embeddings),
            )
        return self.engine

    def answers(
        self, processor: Any, images: Sequence[Any], prompts: Sequence[str], seed: int, **how: Any
    ) -> tuple[list[list[int]], list[bool], float, float | None]:
        """Tokens of each answer, whether its end came, the seconds, and those to the first token."""
        from vllm import SamplingParams

        if how.get("num_beams", 1) > 1:
            raise VlmFixError("--engine vllm answers greedily or by sampling: drop --num-beams.")
        sampled = (
            {"temperature": how["temperature"], "top_p": how["top_p"]} if how.get("do_sample") else {"temperature": 0.0}
        )
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
                add_generation_prompt=True,
            )
            for prompt in prompts
        ]
        bos = processor.tokenizer.bos_token
        twice = bos is not None and texts[0].startswith(bos)  # no second start token if the template already writes it
        texts = [text.removeprefix(bos) if twice else text for text in texts]
        engine = self.start()
        params = [
            SamplingParams(max_tokens=how["max_new_tokens"], seed=seed + i, detokenize=False, **sampled)
            for i in range(len(texts))
        ]
        asked = [{"prompt": t, "multi_modal_data": {"image": i}} for t, i in zip(texts, images, strict=True)]
        begin = time.perf_counter()
        outputs = engine.generate(asked, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        first = getattr(outputs[0].metrics, "first_token_latency", None)
        tokens = [list(o.outputs[0].token_ids) for o in outputs]
        return tokens, [o.outputs[0].finish_reason == "stop" for o in outputs], seconds, first
