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

from vlm_fix.calibrated import Calibration, apply
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.prompts import without_start
from vlm_fix.families import arch_of
from vlm_fix.method import Baseline, Method
from vlm_fix.serving import refusals
from vlm_fix.serving.engine import ServedEngine
from vlm_fix.serving.memory import share

from .elsewhere import Batch, Elsewhere, Gone


class ServedModel(Elsewhere):
    """In an engine of vLLM in this process."""

    option = "--engine vllm"

    def __init__(self, path: str, dtype: str, device: str) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise VlmFixError("--engine vllm: vLLM is not installed: pip install 'vlm-fix[vllm]'.")
        super().__init__(path, torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"))
        self.dtype_name = "float32" if dtype == "auto" and self.device.type == "cpu" else dtype  # as `load_model` does
        self.engine: Any = None
        self.running: tuple[str, ...] | None = None

    def identity(self, name: str) -> dict[str, Any]:
        return super().identity(name) | {"dtype": self.dtype_name, "device": self.device.type, "engine": "vllm"}

    @contextlib.contextmanager
    def applied(self, stack: Sequence[Method], calibration: Sequence[Calibration]) -> Iterator[None]:
        """vLLM starts with the first batch."""
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
        """The engine of the run. Raises Gone if vLLM cannot start."""
        if self.engine is None:
            from vllm import LLM

            more: dict[str, Any] = {"additional_config": {"vlm_fix": list(self.running)}} if self.running else {}
            if fits := share():
                more["gpu_memory_utilization"] = fits
            try:
                self.engine = LLM(
                    self.path,
                    dtype=self.dtype_name,
                    enforce_eager=self.device.type == "cpu",
                    enable_prefix_caching=False,  # batches then cost the same in any order
                    max_model_len=min(4096, self.bare.config.get_text_config().max_position_embeddings),
                    **more,
                )
            except VlmFixError:
                raise
            except Exception as error:  # no batch has another chance
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise Gone(
                    f"vLLM could not start ({said[:300]}): its log above says why; when it can, go on with --resume."
                ) from error
        return self.engine

    def answers(self, processor: Any, images: Sequence[Any], prompts: Sequence[str], seed: int, **how: Any) -> Batch:
        from vllm import SamplingParams

        sampled = self.sampling(how)
        texts = [without_start(processor, prompt) for prompt in prompts]
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
        ids = [list(o.outputs[0].token_ids) for o in outputs]
        texts = [text.strip() for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        ended = [o.outputs[0].finish_reason == "stop" for o in outputs]
        return Batch(texts, [len(row) for row in ids], ended, seconds, first, ids)
