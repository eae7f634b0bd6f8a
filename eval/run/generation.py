"""Run batches of samples through `generate`, and measure time and memory.

Batches and their seeds depend only on the samples and the run's seed. A sample that cannot be answered gets an error
instead; a batch that is too large for memory is repeated sample by sample.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import vlm_fix
from vlm_fix.errors import VlmFixError
from vlm_fix.eval.prompts import encode
from vlm_fix.eval.tasks import Sample, load_image
from vlm_fix.wing import installed

from .elsewhere import Batch, Elsewhere, Gone
from .first import FirstToken, tokens_of


class _FirstToken(StoppingCriteria):
    """Stopping criterion that never stops; it records the time of the first new token."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.at is None:
            if input_ids.is_cuda:
                torch.cuda.synchronize(input_ids.device)
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    prompts: Sequence[str],
    seed: int,
    yes_no: bool = False,
    **how: Any,
) -> Batch:
    """Answer each (image, prompt) pair through `generate`, or through vLLM where the model is inside it.

    `yes_no` also reads the probabilities of yes and no, where `generate` chooses the tokens.
    """
    if isinstance(model, Elsewhere):
        return model.answers(processor, images, prompts, seed, **how)
    inputs, tokenizer = encode(model, processor, images, prompts), processor.tokenizer
    torch.manual_seed(seed)
    clock, first = _FirstToken(), None
    if yes_no and not chooses_tokens(model):
        first = FirstToken(tokens_of(tokenizer), len(prompts), how.get("num_beams") or 1)
        how["logits_processor"] = LogitsProcessorList([first])
    start = time.perf_counter()
    output = model.generate(**inputs, stopping_criteria=StoppingCriteriaList([clock]), **how)
    if output.is_cuda:
        torch.cuda.synchronize(output.device)
    seconds = time.perf_counter() - start
    new = output[:, inputs["input_ids"].shape[1] :].cpu()
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    is_end = torch.isin(new, torch.tensor(ends if isinstance(ends, list) else [ends]))
    finished = is_end.any(dim=1)
    tokens = torch.where(finished, is_end.int().argmax(dim=1) + 1, new.shape[1])
    term = vlm_fix.contrast_term(model)
    return Batch(
        texts=[text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)],
        tokens=tokens.tolist(),
        finished=finished.tolist(),
        seconds=seconds,
        first_token=clock.at - start if clock.at else None,
        ids=[row[:n] for row, n in zip(new.tolist(), tokens.tolist(), strict=True)],
        term=(term.squares, term.dof) if term else None,
        yes_no=first.probabilities() if first else None,
        gated=term.gated if term else None,
    )


def chooses_tokens(model: Any) -> bool:
    """Whether the tokens are chosen elsewhere than in `generate`: by a method's own loop, or in vLLM."""
    engine = None if isinstance(model, Elsewhere) else installed(model)
    return isinstance(model, Elsewhere) or bool(engine and any(w.own_loop for w in engine.wings))


def batches(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Group samples of similar prompt length, then image size, into batches.

    The batches depend only on the samples, not on what is already answered or on the number of processes.
    """
    order = sorted(samples, key=lambda s: (len(s.prompt.split()), len(s.prompt), _pixels(s)))
    return [order[i : i + size] for i in range(0, len(order), size)]


def _pixels(sample: Sample) -> int:
    """Return width times height from the file's header; 0 if it cannot be read, which `load_image` will report."""
    if isinstance(sample.image, Image.Image):
        return math.prod(sample.image.size)
    with contextlib.suppress(Exception), Image.open(sample.image) as image:
        return math.prod(image.size)
    return 0


def _seed(seed: int, samples: Sequence[Sample]) -> int:
    """Return the seed of a batch, the same in every run, so that methods share random numbers with the baseline."""
    text = "|".join([str(seed), *(sample.id for sample in samples)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def _reset_warnings(model: Any) -> None:
    """Reset the warn-once state, so that every batch reports its warnings and not only the discarded warm-up."""
    engine = installed(model)
    if engine:
        engine.warned.clear()


def answer(model: Any, processor: Any, samples: Sequence[Sample], seed: int, **how: Any) -> list[dict[str, Any]]:
    """Return one row per sample, in order; a sample that cannot be answered has an `error` instead of an answer."""
    rows: dict[str, dict[str, Any]] = {}
    images = {}
    for sample in samples:
        try:
            images[sample.id] = load_image(sample)
        except VlmFixError as error:
            rows[sample.id] = {"error": str(error)}
    ready = [sample for sample in samples if sample.id in images]
    pending = [ready] if ready else []
    seconds, first_token = 0.0, None
    notes: dict[str, None] = {}
    terms, gates = [], []
    asked = all(sample.yes_no for sample in samples)
    while pending:
        part = pending.pop(0)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                _reset_warnings(model)
                shown, prompts = [images[s.id] for s in part], [s.prompt for s in part]
                told = {"yes_no": True} if asked else {}
                batch = generate(model, processor, shown, prompts, _seed(seed, part), **told, **how)
            notes |= dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))
        except Gone:
            raise
        except Exception as error:  # one bad sample, or a batch too large for memory, must not end the run
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(part) > 1:
                pending = [[sample] for sample in part]
            else:
                rows[part[0].id] = {"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"}
            continue
        seconds += batch.seconds
        first_token = first_token or batch.first_token
        terms += [batch.term] if batch.term else []
        gates += [batch.gated] if batch.gated else []
        for i, sample in enumerate(part):
            row = {"answer": batch.texts[i], "tokens": batch.tokens[i], "finished": batch.finished[i], "error": None}
            if asked:
                row["p_yes"], row["p_no"] = batch.yes_no[i] if batch.yes_no else (None, None)
            rows[sample.id] = row
        rows |= {s.id: {"error": why} for s, why in zip(part, batch.errors, strict=False) if why is not None}
    term = [math.fsum(t[0] for t in terms), sum(t[1] for t in terms)] if terms else None
    batch_wide: dict[str, Any] = {"batch_seconds": seconds, "batch_first_token": first_token}
    batch_wide |= {"batch_warnings": list(notes), "batch_term": term}
    batch_wide["batch_gated"] = [sum(part) for part in zip(*gates, strict=True)] or None
    return [{**{"answer": None, "tokens": 0, "finished": False}, **rows[s.id], **batch_wide} for s in samples]


def warm_up(
    model: Any, processor: Any, samples: Sequence[Sample], seed: int, how: dict[str, Any], own: Mapping[str, Any]
) -> None:
    """Make a short untimed call, so that a combination that a method refuses ends the run before anything is written.

    `own` are the arguments among `how` that the user added with --gen-kwargs. Raises VlmFixError if `generate` refuses them.
    """
    images, prompts = readable(samples)
    if images:
        short = {**how, "max_new_tokens": min(2, how["max_new_tokens"])}
        try:
            with warnings.catch_warnings(action="ignore"):
                errors = generate(model, processor, images, prompts, seed, **short).errors
            if errors and None not in errors:
                raise VlmFixError(f"no request is answered: {errors[0]}.")
        except VlmFixError:
            raise
        except (ValueError, TypeError) as error:
            if own:
                said = " ".join(str(error).split()) or type(error).__name__
                raise VlmFixError(
                    f"generate refuses these settings ({said[:300]}): mend --gen-kwargs, which are {', '.join(own)}."
                ) from None
        except Exception:  # the batch itself will record the error, sample by sample
            return


def readable(samples: Sequence[Sample]) -> tuple[list[Image.Image], list[str]]:
    """Return the images that can be read, and their prompts."""
    found: tuple[list[Image.Image], list[str]] = ([], [])
    for sample in samples:
        with contextlib.suppress(VlmFixError):
            found[0].append(load_image(sample))
            found[1].append(sample.prompt)
    return found


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of `peak_mb`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux: reset the high-water mark, so that runs do not inherit it
            Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float:
    """Return the peak memory since `reset_peak` in MB: CUDA allocator, or resident size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with contextlib.suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
