"""Beside other people's code: `vlm-fix bench peers` times a method and a peer that does the same, in one run.

Each round runs the model alone, our method and its peer, in turns that rotate; ratios are to the model alone in that round.
On a CPU the clock is the processor's time of this process, which other programs on the machine hardly change; on CUDA it is
the wall clock. Peers:

  hf-cfg            Hugging Face's classifier-free guidance against the prompt without its image
  eager-pai, -vaf   the formula in a replaced eager attention of every layer, all weights formed, as the papers' code does it
  mitigv-*          the package mitigv with the bench's prompt in place of its processor's
  kvpress-*         the package kvpress; of all columns of the prompt it leaves as many as our method, which spares the text

A peer whose package is not installed, or that does not run, gets a sentence instead of figures. `alike` counts the first new
tokens that are those of our method; where peers draw noise of their own or choose other columns, it need not be all.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import repeat_kv

import vlm_fix
from vlm_fix.errors import VlmFixError
from vlm_fix.families.compat import CACHE_NAMES, cache_of

from .clock import enough
from .models import IMAGE, PAD, SHAPES, build
from .specs import spec_of

Run = Callable[[int], torch.Tensor]  # number of new tokens -> the new tokens
KEEP = 0.25  # share of the image tokens that the cache pruners leave
PAIRS = (
    ("pai:alpha=0,gamma=1.1", "hf-cfg"),
    ("vcd", "mitigv-vcd"),
    ("icd", "mitigv-icd"),
    ("m3id", "mitigv-m3id"),
    ("pai", "eager-pai"),
    ("pai", "mitigv-pai"),
    ("vaf", "eager-vaf"),
    (f"knorm:keep={KEEP}", "kvpress-knorm"),
    (f"expected_attention:keep={KEEP}", "kvpress-expected_attention"),
)
WORDS = torch.tensor([[11, 12, 13, 14, 15, 16, 17, 18]])  # of the disturbing instruction, in ours and mitigv's


def ours(model: Any, inputs: dict[str, Any], spec: str) -> contextlib.AbstractContextManager[Run]:
    """The model with our method, or alone."""
    return _generate(model, inputs, vlm_fix.wrapped(model, spec.split("+")) if spec else contextlib.nullcontext())


@contextlib.contextmanager
def _generate(model: Any, inputs: dict[str, Any], around: Any, **more: Any) -> Iterator[Run]:
    with around:
        yield lambda new: model.generate(**inputs, max_new_tokens=new, do_sample=False, **more)[:, -new:]


def peer(model: Any, inputs: dict[str, Any], name: str) -> contextlib.AbstractContextManager[Run]:
    """The model with a peer's code."""
    package, _, what = name.partition("-")
    if name == "hf-cfg":
        words = text_only(inputs)["input_ids"]
        more = {"guidance_scale": 1.1, "negative_prompt_ids": words, "negative_prompt_attention_mask": words * 0 + 1}
        return _generate(model, inputs, contextlib.nullcontext(), **more)
    if package == "eager":
        return _generate(model, inputs, eager(model, inputs["input_ids"], what))
    if importlib.util.find_spec(package) is None:
        raise VlmFixError(f"{package} is not installed here: pip install --no-deps {package}.")
    return mitigv(model, inputs, what) if package == "mitigv" else kvpress(model, inputs, what)


def text_only(inputs: dict[str, Any]) -> dict[str, Any]:
    """The prompt without its image."""
    words = inputs["input_ids"][inputs["input_ids"] != IMAGE][None]
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


@contextlib.contextmanager
def eager(model: Any, ids: torch.Tensor, what: str) -> Iterator[None]:
    """PAI (alpha .2, from layer 2) or VAF (1.15 and .95, layers 9-14 of 32) by their formula, in an eager attention."""
    depth, image = model.config.get_text_config().num_hidden_layers, (ids[0] == IMAGE).nonzero()[:, 0].tolist()
    first, end = image[0], image[-1] + 1
    layers = range(2, depth) if what == "pai" else range(round(9 / 32 * depth), round(14 / 32 * depth) + 1)

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        if module.layer_idx in layers and what == "pai":
            scores[:, :, -1, first:end] += 0.2 * scores[:, :, -1, first:end].abs()
        elif module.layer_idx in layers:
            rows = scores[:, :, end if scores.shape[2] > 1 else 0 :]
            rows[..., first:end] *= 1.15
            rows[..., :first] *= 0.95
        if mask is not None:
            scores = scores + mask
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    before = model.config.get_text_config()._attn_implementation
    AttentionInterface.register("bench_eager", attention)
    AttentionMaskInterface.register("bench_eager", eager_mask)
    model.set_attn_implementation({"text_config": "bench_eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})


class Given:
    """A processor for mitigv that answers with the bench's prompt, and notes the tokens it is to decode."""

    eos_token_id, pad_token_id = None, PAD

    def __init__(self, inputs: dict[str, Any]):
        self.inputs, self.new = inputs, torch.empty(0)
        self.tokenizer = self

    def __call__(self, text: str, images: Any = None, **_: Any) -> dict[str, Any]:
        made = dict(self.inputs) if images is not None else text_only(self.inputs)
        if text != "<image>\nbench" and images is not None:  # the disturbed instruction
            made["input_ids"] = torch.cat([made["input_ids"], WORDS.to(made["input_ids"])], dim=1)
            made["attention_mask"] = torch.ones_like(made["input_ids"])
        return made

    def batch_decode(self, new: torch.Tensor, **_: Any) -> list[str]:
        self.new = new
        return [""] * len(new)


@contextlib.contextmanager
def mitigv(model: Any, inputs: dict[str, Any], what: str) -> Iterator[Run]:
    from mitigv import mitigate

    given = Given(inputs)
    # its patched attention adds the mask as numbers: on SDPA there may be none, and the prompt would look ahead
    before, numbers = model.config.get_text_config()._attn_implementation, what == "pai"
    if numbers:
        model.set_attn_implementation({"text_config": "eager"})
    options = {"gamma": 1.0, "beta": 0.0, "alpha": 0.2} if numbers else {}
    try:
        # the class, not its name: for a name it adapts the model, and then does not find LLaVA's layers
        kind = getattr(importlib.import_module(f"mitigv.algorithms.{what}"), what.upper())
        with mitigate(kind, model=model, processor=given, **options) as made:

            def run(new: int) -> torch.Tensor:
                made.generate("image", "<image>\nbench", max_new_tokens=new, do_sample=False)
                return given.new[:, -new:]

            yield run
    finally:
        model.set_attn_implementation({"text_config": before})


@contextlib.contextmanager
def kvpress(model: Any, inputs: dict[str, Any], what: str) -> Iterator[Run]:
    import kvpress

    width, visual = inputs["input_ids"].shape[1], int((inputs["input_ids"] == IMAGE).sum())
    dropped = visual - round(KEEP * visual)
    kinds = {"knorm": kvpress.KnormPress, "expected_attention": kvpress.ExpectedAttentionPress}
    press = kinds[what](compression_ratio=dropped / width)
    hook = press.forward_hook

    def renamed(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """With the names of arguments that it knows and transformers gives no more."""
        cache, count = cache_of(kwargs), kwargs["hidden_states"].shape[1]
        seen = cache.layers[module.layer_idx].keys.shape[2]
        place = torch.arange(seen - count, seen) if count > 1 else torch.tensor([width])
        return hook(module, args, kwargs | dict.fromkeys(CACHE_NAMES, cache) | {"cache_position": place}, output)

    press.forward_hook = renamed
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # it does not know LLaVA's class, only its layers
    plain = {k: v for k, v in inputs.items() if k != "attention_mask"}  # generate would keep it at the full width
    with press(model), _generate(model, plain, contextlib.nullcontext()) as run:
        yield run


def clocked(run: Run, tokens: int, device: torch.device) -> tuple[float, float, torch.Tensor]:
    """Seconds to the first token, seconds a token after it, and the tokens: an answer less one of a single token."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return time.process_time()

    start = now()
    run(1)
    middle = now()
    made = run(tokens)
    first = middle - start
    return first, max(now() - middle - first, 1e-9) / (tokens - 1), made


def run(
    methods: Sequence[str] = (),
    shape: str = "small",
    *,
    device: str = "cpu",
    dtype: str = "float32",
    new_tokens: int = 32,
    rounds: int = 3,
    seed: int = 0,
    tick: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Measure the pairs whose method or peer is among `methods` (all) and return settings and rows."""
    if shape not in SHAPES or SHAPES[shape].family != "llava":
        own = ", ".join(name for name, s in SHAPES.items() if s.family == "llava")
        raise VlmFixError(f"--shape {shape!r} does not go with bench peers: give one of {own}.")
    enough(new_tokens, rounds)
    pairs = [p for p in PAIRS if not methods or {p[0].partition(":")[0], p[1]} & {*methods}]
    known = {name for spec, peer in PAIRS for name in (spec.partition(":")[0], peer)}
    if unknown := sorted({*methods} - known):
        raise VlmFixError(f"--method {unknown[0]!r} has no peer here; there are {', '.join(sorted(known))}.")
    where = torch.device(device)
    net, inputs = build(SHAPES[shape], where, getattr(torch, dtype), seed)
    rows = [
        _pair(net, inputs, *pair, new_tokens, rounds, functools.partial(tick, len(pairs)) if tick else None)
        for pair in pairs
    ]
    packages = ("mitigv", "kvpress")
    found = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)}
    versions = {"vlm-fix": vlm_fix.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "bench": "peers",
        "shape": shape,
        "dtype": dtype,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": new_tokens,
        "rounds": rounds,
        "seed": seed,
        "clock": "wall" if where.type == "cuda" else "processor",
        "hardware": torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "versions": versions | found,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "rows": rows,
    }


def _pair(
    model: Any, inputs: dict[str, Any], spec: str, name: str, tokens: int, rounds: int, tick: Any
) -> dict[str, Any]:
    """One method and one peer."""
    device = inputs["input_ids"].device
    full = spec_of(spec, model.config.get_text_config().num_hidden_layers)
    row: dict[str, Any] = {"spec": spec, "peer": name, "note": ""}
    sides: list[Callable[[], Any]] = [
        lambda: ours(model, inputs, ""), lambda: ours(model, inputs, full), lambda: peer(model, inputs, name)
    ]  # fmt: skip
    seconds: list[list[tuple[float, float]]] = [[], [], []]
    made: dict[int, torch.Tensor] = {}
    try:
        for turn in range(-1, rounds):  # the first warms up
            for i in ((turn + j) % 3 for j in range(3)):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    with sides[i]() as side:
                        first, each, made[i] = clocked(side, 2 if turn < 0 else tokens, device)
                if turn >= 0:
                    seconds[i].append((first, each))
    except Exception as error:  # other people's code: whatever it says is the row
        row["note"] = f"{type(error).__name__}: {error}".splitlines()[0]
        return row
    finally:
        if tick:
            tick()
    same = (made[1] == made[2])[0] if made[1].shape == made[2].shape else torch.zeros(1)
    row["alike"] = int(same.long().cumprod(dim=0).sum())
    for key, i in (("ours", 1), ("theirs", 2)):
        for what, j in (("first_token", 0), ("each_token", 1)):
            ratios = [own[j] / plain[j] for own, plain in zip(seconds[i], seconds[0], strict=True)]
            row[f"{key}_{what}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return row


def table(results: dict[str, Any]) -> Any:
    """Format the results for the terminal."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    head = ("method", "first token", "each token", "peer", "first token", "each token", "tokens alike")
    out = Table(*head, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    out.title = f"{results['shape']}, {results['dtype']}, {results['rounds']} rounds, {results['hardware']}"
    out.caption = (
        f"{results['clock']} time / the model alone in the same round: median (lowest, highest); lower is better"
    )
    for row in results["rows"]:
        if row["note"]:
            out.add_row(row["spec"], "", "", f"{row['peer']}: {escape(row['note'])}", "", "", "")
            continue
        cells = {k: "{:.2f} ({:.2f}, {:.2f})".format(*v) for k, v in row.items() if k.endswith("_token")}
        own, theirs = ([cells[f"{who}_{what}"] for what in ("first_token", "each_token")] for who in ("ours", "theirs"))
        out.add_row(row["spec"], *own, row["peer"], *theirs, f"{row['alike']} of {results['new_tokens']}")
    return out
