"""Speed and memory of methods, as ratios to the unwrapped model, in one run on one machine.

`vlm-fix bench attention|decode|prune` builds a model of a known shape with random weights (speed does not depend on
the values) and times every method of a kind in interleaved rounds: in each round the
unwrapped model runs right before the method, and the round's ratio is taken between these two. Printed is the median of
the rounds with their lowest and highest. Columns:

  first token     seconds from the call of generate to its first token: vision tower, pruning scores and prefill
  tokens/s        after the first token, greedy, without an end token
  peak memory     of the allocator in a run of one new token: CUDA's own; on a CPU torch.profiler's memory events
  kept, KV MB     pruning: visual columns left in the cache, mean over layers, and the cache's bytes after the prefill
  scoring         first token minus that of random_tokens, which keeps as many and scores nothing; of the cache methods,
                  minus the unwrapped one. Inside the language model scores and saved layers do not part: blank

`attention` also times every attention edit on Hugging Face's eager attention in all layers, as the papers' own code runs
them ("pai @ eager"); `decode` also times Hugging Face's own classifier-free-guidance processor ("hf-cfg").
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import platform
import statistics
import time
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.markup import escape
from rich.table import Table

import vlm_fix
from vlm_fix import registry
from vlm_fix.errors import VlmFixError
from vlm_fix.method import AttentionEdit, Method, TokenPruner
from vlm_fix.pruning.kv import CachePruner
from vlm_fix.session import VISUAL

from .loading import check_device

KINDS = ("attention", "decode", "prune")
IMAGE, PAD = 3, 0


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a random-weight model and of its prompt: `side` x `side` visual tokens, text before and after."""

    family: str
    vision: dict[str, Any]
    text: dict[str, Any]
    side: int = 24
    before: int = 35
    after: int = 60


_CLIP = {"patch_size": 14, "projection_dim": 768}
SHAPES = {
    "small": Shape(
        "llava",
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, **_CLIP},
        {
            "hidden_size": 1024,
            "intermediate_size": 2752,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": 8192,
        },
    ),
    "small-qwen": Shape(
        "qwen2_5_vl",
        {"depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "fullatt_block_indexes": [1, 3]},
        {
            "hidden_size": 1024,
            "intermediate_size": 2752,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
    ),
    "llava-1.5-7b": Shape(
        "llava",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            **_CLIP,
        },
        {"vocab_size": 32064},  # the rest is LlamaConfig's default
    ),
    "qwen2.5-vl-7b": Shape(
        "qwen2_5_vl",
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
    ),
}
# Random weights pass no gate and come with no calibration and no tokenizer: settings that make a method do its work.
HEADS = "1.0|2.3|3.5|4.1|4.6|5.2|6.0|6.7"  # layer.head
SPECS = {
    "act": f"act:head_list={HEADS},threshold=0.001",
    "ad_hh": f"ad_hh:head_list={HEADS},threshold=0",
    "carve": "carve:tokens=11|12|13,black=-1.79|-1.75|-1.48",
    "decore": f"decore:head_list={HEADS}",
    "head_pursuit": f"head_pursuit:head_list={HEADS}",
    "iava": "iava:tokens=11|12|13|14|15|16|17|18",
    "layercake": "layercake:punctuation=11|12|13,concepts=14|15|16|17|18",
    "icd": "icd:tokens=11|12|13|14|15|16|17|18",
    "iri": "iri:rr_attention=RATES,rr_mlp=RATES",
    "var": "var:tau=2.5,min_visual_mass=0,rho=0",
    "yes_threshold": "yes_threshold:yes=11,no=12",
    "yes_bias": "yes_bias:tokens=11|12|13|14",
}


def build(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """A random-weight model of `shape` and the inputs of one prompt with one image."""
    torch.manual_seed(seed)
    side = shape.side
    common = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096}
    if shape.family == "llava":
        vision: Any = transformers.CLIPVisionConfig(**{**shape.vision, "image_size": side * shape.vision["patch_size"]})
        llava: Any = transformers.LlavaConfig
        config: Any = llava(
            vision_config=vision,
            text_config=transformers.LlamaConfig(**{**common, **shape.text}),
            image_token_id=IMAGE,
            image_token_index=IMAGE,
            image_seq_length=side * side,
        )
        kind: Any = transformers.LlavaForConditionalGeneration
        inputs = {"pixel_values": torch.randn(1, 3, vision.image_size, vision.image_size)}
    else:
        vision_sizes = {"out_hidden_size": shape.text["hidden_size"], "patch_size": 14, "spatial_merge_size": 2}
        config = transformers.Qwen2_5_VLConfig(
            vision_config={**vision_sizes, **shape.vision},
            text_config={**common, **shape.text},
            image_token_id=IMAGE,
            video_token_id=4,
            vision_start_token_id=5,
            vision_end_token_id=6,
        )
        kind = transformers.Qwen2_5_VLForConditionalGeneration
        inputs = {
            "pixel_values": torch.randn(4 * side * side, 3 * 2 * 14 * 14),
            "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]]),
        }
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    words = torch.randint(10, config.get_text_config().vocab_size, (shape.before + shape.after,))
    words[0] = 1
    image = torch.full((side * side,), IMAGE)
    ids = torch.cat([words[: shape.before], image, words[shape.before :]])[None]
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.family == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    inputs = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
    return model.eval(), inputs


class _Clock(transformers.StoppingCriteria):
    """Notes when each token was there; never stops."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        self.start = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def timed(model: Any, inputs: dict[str, Any], tokens: int, **kwargs: Any) -> tuple[float, float]:
    """Seconds to the first token and tokens/s after it, of one greedy generate."""
    clock = _Clock(inputs["input_ids"].device)

    def run(new: int) -> float:
        model.generate(**inputs, max_new_tokens=new, do_sample=False, stopping_criteria=[clock], **kwargs)
        return clock.now()

    end = run(tokens)
    if len(clock.times) >= tokens:
        first, last = clock.times[0], clock.times[tokens - 1]
        return first - clock.start, (tokens - 1) / (last - first)
    whole = end - clock.start  # a loop that does not go token by token: take one token away
    first = run(1) - end
    return first, (tokens - 1) / max(whole - first, 1e-9)


def peak_mb(run: Callable[[], Any], device: torch.device) -> float:
    """The most memory that `run` held at once beyond what was held before it, in MB (10^6 bytes)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = peak = 0
    found = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(found, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 1e6


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Wrapped models compute every layer's attention as Hugging Face's eager code does, all weights formed."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    from vlm_fix.attention import apart, columns, function

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        count, width = query.shape[2], key.shape[2]
        if mask is None and count > 1:
            mask = torch.ones(count, width, dtype=torch.bool, device=key.device).tril(width - count)[None, None]
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=key.device).masked_fill(~mask, -torch.inf)
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return eager_attention_forward(module, query, key, value, mask, scaling=scaling)

    with contextlib.ExitStack() as patches:
        for module in (function, columns, apart):
            patches.enter_context(unittest.mock.patch.object(module, "sdpa_attention_forward", attention))
        yield


@dataclasses.dataclass
class Row:
    """One method's measurements; ratios are method / unwrapped of the same round: median, lowest, highest."""

    spec: str
    first_token: tuple[float, float, float] = (1.0, 1.0, 1.0)
    tokens_per_second: tuple[float, float, float] = (1.0, 1.0, 1.0)
    memory: float = 1.0
    seconds: float = 0.0  # to the first token, median
    speed: float = 0.0  # tokens/s, median
    peak_mb: float = 0.0
    kept: float | None = None
    kv_mb: float | None = None
    scoring: float | None = None  # seconds
    note: str = ""


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


@contextlib.contextmanager
def _running(model: Any, spec: str) -> Iterator[dict[str, Any]]:
    """The model as `spec` says, and generate's extra arguments."""
    if spec == "hf-cfg":
        words = [t for t in range(10, 20)]
        yield {"guidance_scale": 1.1, "negative_prompt_ids": torch.tensor([words], device=model.device)}
        return
    name, _, edited = spec.partition(" @ ")
    with eager() if edited == "eager" else contextlib.nullcontext(), vlm_fix.wrapped(model, name.split("+")):
        yield {}


def measure(
    model: Any, inputs: dict[str, Any], specs: list[str], tokens: int, rounds: int, tick: Any = None
) -> list[Row]:
    """Time `specs` against the unwrapped model, which is row 0; a spec that cannot run gets a note and no figures."""
    device = inputs["input_ids"].device

    def warm(extra: dict[str, Any]) -> float:
        model.generate(**inputs, max_new_tokens=2, do_sample=False, **extra)
        return peak_mb(lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False, **extra), device)

    rows = [Row("baseline", peak_mb=warm({}))]
    base: list[tuple[float, float]] = []
    for spec in specs:
        row = Row(spec)
        rows.append(row)
        try:
            with warnings.catch_warnings(record=True) as said, _running(model, spec) as extra:
                warnings.simplefilter("always")
                row.peak_mb = warm(extra)
                row.kept, row.kv_mb = _cache(model, inputs, extra)
            row.memory = row.peak_mb / rows[0].peak_mb
            row.note = "edited nothing" if any("changed nothing" in str(w.message) for w in said) else ""
            pairs = []
            for _ in range(rounds):
                plain = timed(model, inputs, tokens)
                with warnings.catch_warnings(), _running(model, spec) as extra:
                    warnings.simplefilter("ignore")
                    pairs.append((plain, timed(model, inputs, tokens, **extra)))
                base.append(plain)
        except (VlmFixError, NotImplementedError) as error:
            row.note = str(error)
            continue
        finally:
            if tick:
                tick()
        row.first_token = _spread([ours[0] / plain[0] for plain, ours in pairs])
        row.tokens_per_second = _spread([ours[1] / plain[1] for plain, ours in pairs])
        row.seconds = statistics.median(ours[0] for _, ours in pairs)
        row.speed = statistics.median(ours[1] for _, ours in pairs)
    rows[0].kept, rows[0].kv_mb = _cache(model, inputs, {})
    if base:
        rows[0].seconds, rows[0].speed = (statistics.median(v) for v in zip(*base, strict=True))
    return rows


def _cache(model: Any, inputs: dict[str, Any], extra: dict[str, Any]) -> tuple[float | None, float | None]:
    """Visual columns stored after the prefill, mean over layers, and the cache's size in MB, columns laid aside included."""
    out = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, **extra)
    layers = getattr(getattr(out, "past_key_values", None), "layers", None)
    if not layers or not all(isinstance(layer.keys, torch.Tensor) for layer in layers):
        return None, None
    engine, aside = model.__dict__.get("_vlm_fix_engine"), [getattr(layer, "aside", None) or () for layer in layers]
    session = engine and engine.sessions.get(out.past_key_values)
    if session:
        visual = [int((session.at(i).types == VISUAL).sum()) for i in range(len(layers))]
    else:
        visual = [layer.keys.shape[-2] - int((inputs["input_ids"] != IMAGE).sum()) for layer in layers]
    kept = statistics.mean(n + (parts[0].shape[-2] if parts else 0) for n, parts in zip(visual, aside, strict=True))
    tensors = [x for layer, parts in zip(layers, aside, strict=True) for x in (layer.keys, layer.values, *parts)]
    return kept, sum(x.numel() * x.element_size() for x in tensors) / 1e6


def methods_of(kind: str, depth: int = 8) -> list[str]:
    """Specs of all registered methods of a bench kind, each doing its usual work on a random-weight model."""
    return [spec_of(m.name, depth) for m in registry.list_methods() if _kind(m) == kind]


def spec_of(name: str, depth: int = 8) -> str:
    """A spec under which the method does its usual work on a random-weight model of `depth` layers."""
    rates = "|".join(f"{(depth - i) / depth:.3g}" for i in range(depth))
    return SPECS.get(name, name).replace("RATES", rates)


def _kind(method: type[Method]) -> str:
    if method.kind == "pruning":
        return "prune"
    inside = issubclass(method, AttentionEdit) or method.kind == "hidden"
    if inside and method.kind not in ("contrast", "logits", "procedure"):  # these only use an edit
        return "attention"
    return "decode" if method.name != "baseline" else ""


def run(
    kind: str,
    shape: str = "small",
    methods: list[str] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    new_tokens: int = 32,
    rounds: int = 3,
    keep: tuple[float, ...] = (192, 64),
    seed: int = 0,
    tick: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Measure one kind -> what was run, on what, and the rows. `tick(total)` is called after each method."""
    if shape not in SHAPES:
        raise VlmFixError(f"--shape {shape!r} is not one of {', '.join(SHAPES)}.")
    if new_tokens < 2 or rounds < 1:
        raise VlmFixError("--new-tokens must be at least 2 and --rounds at least 1.")
    check_device(device)
    for spec in methods or []:
        if spec != "hf-cfg":
            registry.parse(spec.partition(" @ ")[0].split("+"))
    where = torch.device(
        "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    )
    kinds = {"auto": torch.bfloat16 if where.type == "cuda" else torch.float32}
    weights = kinds.get(dtype) or getattr(torch, dtype)
    net, inputs = build(SHAPES[shape], where, weights, seed)
    depth = net.config.get_text_config().num_hidden_layers
    specs = [spec_of(spec, depth) for spec in methods] if methods else methods_of(kind, depth)
    if kind == "prune":
        specs = [_with_keep(spec, k) for k in keep for spec in specs]
    elif kind == "attention" and not methods:
        specs += [f"{s} @ eager" for s in specs if issubclass(registry.get_method(s.partition(":")[0]), AttentionEdit)]
    elif kind == "decode" and not methods:
        specs.append("hf-cfg")
    rows = measure(net, inputs, specs, new_tokens, rounds, functools.partial(tick, len(specs)) if tick else None)
    if kind == "prune":
        controls = {_keep(r.spec): r.seconds for r in rows if r.spec.startswith("random_tokens")}
        for row in rows[1:]:
            method = registry.get_method(row.spec.partition(":")[0])
            if row.note or "+" in row.spec:
                continue
            if issubclass(method, TokenPruner) and not method.edits("shrink") and _keep(row.spec) in controls:
                row.scoring = row.seconds - controls[_keep(row.spec)]
            elif issubclass(method, CachePruner):
                row.scoring = row.seconds - rows[0].seconds
    name = (
        torch.cuda.get_device_name(where)
        if where.type == "cuda"
        else f"{platform.processor() or platform.machine()} CPU"
    )
    return {
        "bench": kind,
        "shape": shape,
        "dtype": str(weights).removeprefix("torch."),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "visual_tokens": int((inputs["input_ids"] == IMAGE).sum()),
        "new_tokens": new_tokens,
        "rounds": rounds,
        "seed": seed,
        "hardware": name,
        "threads": torch.get_num_threads(),
        "versions": {
            "vlm-fix": vlm_fix.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _keep(spec: str) -> str:
    return next((p for p in spec.replace(":", ",").split(",") if p.startswith("keep=")), "")


def _with_keep(spec: str, keep: float) -> str:
    return spec if "keep=" in spec else f"{spec}{',' if ':' in spec else ':'}keep={keep:g}"


def write(results: dict[str, Any], path: Path) -> None:
    """The results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def table(results: dict[str, Any]) -> Table:
    """The results as a table for the terminal."""
    prune = results["bench"] == "prune"
    head = ["method", "first token", "tokens/s", "peak memory"] + ["kept", "KV MB", "scoring"] * prune
    out = Table(*head, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    out.title = (
        f"{results['shape']}, {results['dtype']}, {results['prompt_tokens']} prompt tokens "
        f"({results['visual_tokens']} visual), {results['new_tokens']} new, {results['rounds']} rounds, {results['hardware']}"
    )
    out.caption = escape("ratios to the unwrapped model in the same round: median [lowest, highest]")
    out.columns[0].overflow = "fold"
    for column in out.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for i, row in enumerate(results["rows"]):
        if not row["seconds"] and i:
            out.add_row(f"{escape(row['spec'])}\n[dim]{escape(row['note'])}[/dim]")
            continue
        cells = (
            [f"{row['seconds']:.3f} s", f"{row['speed']:.1f}", f"{row['peak_mb']:.0f} MB"]
            if i == 0 and row["seconds"]
            else ["not timed", "", f"{row['peak_mb']:.0f} MB"]
            if i == 0
            else [_ratio(row["first_token"]), _ratio(row["tokens_per_second"]), f"{row['memory']:.2f}"]
        )
        if prune:
            cells += [
                "" if row["kept"] is None else f"{row['kept']:.0f}",
                "" if row["kv_mb"] is None else f"{row['kv_mb']:.1f}",
                "" if row["scoring"] is None else f"{1000 * row['scoring']:.0f} ms",
            ]
        out.add_row(escape(row["spec"]) + (f"\n[dim]{row['note']}[/dim]" if row["note"] else ""), *cells)
    return out


def _ratio(spread: list[float]) -> str:
    return f"{spread[0]:.2f} [{spread[1]:.2f}, {spread[2]:.2f}]"
