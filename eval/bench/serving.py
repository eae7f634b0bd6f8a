"""Benchmark methods inside vLLM: plain vLLM, vLLM with each method, and Hugging Face's generate, in one run.

`vlm-fix bench serve` keeps 1, 8 and 32 requests in flight, each an image and a question with a fixed number of new tokens, and
counts requests/s, tokens/s, seconds to the first token (median) and the processor seconds of a request, which other programs on
the machine hardly change: on a busy CPU they tell what a method costs, and the others do not. Runs are interleaved: each method
runs right before or after plain vLLM, and the ratio is between these two; the table shows the median of the rounds, the lowest
and the highest. Every engine lives in this process, with as many threads as `generate`. Neither prompts nor images are kept from
run to run.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

import vlm_fix
from vlm_fix.eval.picto import scene
from vlm_fix.eval.prompts import encode, without_start
from vlm_fix.eval.run.loading import hardware, load_model

from .clock import enough, timed

METHODS = ("pai", "vhr", "iri", "deco", "vcd", "hiprune:keep=0.25")  # one of each kind
LEAST, MOST = 6, 32  # requests of a run, if no more are in flight: two for each in flight between them
CONCURRENT = (1, 8, 32)
PLAIN, BESIDE = "vLLM", "generate"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
FIGURES = ("requests_per_second", "tokens_per_second", "first_token", "processor_seconds")


def engine(path: str, spec: str | None, concurrent: int, engines: int) -> Any:
    """vLLM with a stack, or plain; one of `engines` that share the device."""
    from vllm import LLM

    gpu = torch.cuda.is_available()
    more: dict[str, Any] = {"gpu_memory_utilization": round(0.8 / engines, 3)} if gpu else {"dtype": "float32"}
    return LLM(
        path,
        enforce_eager=not gpu,
        enable_prefix_caching=False,
        max_model_len=512,
        max_num_seqs=concurrent,
        additional_config={"vlm_fix": spec} if spec else {},
        **more,
    )


def round_of(llm: Any, prompts: Sequence[Any], concurrent: int, new_tokens: int) -> dict[str, float]:
    """Answer the prompts with `concurrent` of them in flight."""
    from vllm import SamplingParams

    core = llm.llm_engine
    core.reset_encoder_cache()
    core.reset_mm_cache()
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    asked: dict[str, float] = {}
    first: dict[str, float] = {}
    waiting, done = list(enumerate(prompts)), 0
    begin, used = time.perf_counter(), time.process_time()
    while done < len(prompts):
        while waiting and len(asked) - done < concurrent:
            i, prompt = waiting.pop(0)
            asked[str(i)] = time.perf_counter()
            core.add_request(str(i), prompt, params)
        for output in core.step():
            first.setdefault(output.request_id, time.perf_counter() - asked[output.request_id])
            done += output.finished
    return _figures(len(prompts), new_tokens, time.perf_counter() - begin, first.values(), time.process_time() - used)


def beside(model: Any, processor: Any, pairs: Sequence[Any], concurrent: int, new_tokens: int) -> dict[str, float]:
    """Answer them by generate, in batches of `concurrent`."""
    begin, used, waits = time.perf_counter(), time.process_time(), []
    for i in range(0, len(pairs), concurrent):
        images, asked = zip(*pairs[i : i + concurrent], strict=True)
        inputs = encode(model, processor, images, asked)
        waits.append(timed(model, inputs, new_tokens, min_new_tokens=new_tokens)[0])
    return _figures(len(pairs), new_tokens, time.perf_counter() - begin, waits, time.process_time() - used)


def question(i: int) -> str:
    """The i-th question: a description, and from then on a number of words for it, so that no two are alike."""
    return (
        "Describe the image."
        if i == 0
        else " ".join(["Describe the image in", *["about"] * (i % 4), f"{i + 9} words."])
    )


def _figures(count: int, new_tokens: int, seconds: float, waits: Iterable[float], used: float) -> dict[str, float]:
    each = [count / seconds, count * new_tokens / seconds, statistics.median(waits), used / count]
    return dict(zip(FIGURES, each, strict=True))


def run(
    methods: Sequence[str], model: str, new_tokens: int, rounds: int, tick: Callable[[int], Any] | None = None,
    concurrent: Sequence[int] = CONCURRENT, questions: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Measure and return settings, hardware and rows. `tick(total)` is called after each measurement.

    questions: how many different ones are asked in turn, of different lengths; what a method makes of a question alone is
    made once for each. Raises VlmFixError for too few tokens or rounds.
    """
    enough(new_tokens, rounds)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    net, processor, identity = load_model(model)
    specs = list(methods) or list(METHODS)
    own = [*specs, BESIDE]
    texts = [question(i) for i in range(questions)]
    count_of = {count: max(count, min(max(2 * count, LEAST), MOST)) for count in concurrent}
    pairs = [(scene("test", 0, i).image, texts[i % questions]) for i in range(max(count_of.values()))]
    prompts = [{"prompt": without_start(processor, t), "multi_modal_data": {"image": i}} for i, t in pairs]
    rows, total = [], len(specs) + 1 + len(concurrent) * rounds * (len(own) + (len(own) + 1) // 2)
    engines = {}
    for spec in (None, *specs):
        engines[spec or PLAIN] = llm = engine(net.name_or_path, spec, max(concurrent), len(specs) + 1)
        round_of(llm, prompts[:2], 2, 2)
        if tick:
            tick(total)
    for count in concurrent:
        found: dict[str, list[dict[str, float]]] = {}
        ratios: dict[str, list[dict[str, float]]] = {}

        def measure(spec: str, count: int = count, found: dict[str, Any] = found) -> dict[str, float]:
            how = count, new_tokens
            if spec == BESIDE:
                one = beside(net, processor, pairs[: count_of[count]], *how)
            else:
                one = round_of(engines[spec], prompts[: count_of[count]], *how)
            found.setdefault(spec, []).append(one)
            if tick:
                tick(total)
            return one

        for _ in range(rounds):
            for i in range(0, len(own), 2):
                first = measure(own[i])
                base = measure(PLAIN)
                for spec, one in [(own[i], first), *((s, measure(s)) for s in own[i + 1 : i + 2])]:
                    ratios.setdefault(spec, []).append({name: one[name] / base[name] for name in FIGURES})
        for spec in (PLAIN, *own):
            each = found[spec]
            row: dict[str, Any] = {"concurrent": count, "spec": spec}
            row |= {name: statistics.median(one[name] for one in each) for name in FIGURES}
            row["ratios"] = (
                {name: _spread([one[name] for one in ratios[spec]]) for name in FIGURES} if spec in ratios else {}
            )
            rows.append(row)
    return {
        "bench": "serve",
        "model": identity,
        "new_tokens": new_tokens,
        "questions": questions,
        "rounds": rounds,
        "hardware": hardware(net.device),
        "load": os.getloadavg()[0],
        "versions": {"vlm-fix": vlm_fix.__version__, "torch": torch.__version__, "vllm": _version()},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "rows": rows,
    }


def _version() -> str:
    import vllm

    return vllm.__version__


def _spread(values: Sequence[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def table(results: dict[str, Any]) -> Any:
    """Format the results for the terminal."""
    from rich import box
    from rich.table import Table

    out = Table("in flight", "method", "requests/s", "tokens/s", "first token", "processor", box=box.SIMPLE_HEAD)
    how = f"{results['new_tokens']} new tokens, {results['questions']} questions, {results['rounds']} rounds"
    out.title = f"{results['model']['name']}, {how}, {results['hardware']}"
    out.caption = "ratios to plain vLLM in the same round: median (lowest, highest)"
    for row in results["rows"]:
        ratios = [f"{m:.2f} ({low:.2f}, {high:.2f})" for m, low, high in row["ratios"].values()]
        plain = [f"{row['requests_per_second']:.2f}", f"{row['tokens_per_second']:.0f}"]
        plain += [f"{row[name]:.3f} s" for name in FIGURES[2:]]
        out.add_row(str(row["concurrent"]), row["spec"], *(ratios or plain))
    return out
