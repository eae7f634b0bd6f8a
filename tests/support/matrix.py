"""The matrix of attention and hidden-state methods: one row a method, its cells, and what a reference looks at.

A cell is one greedy run of a left-padded batch, prompt and 8 steps, each row of it against the reference on that prompt
alone. The rows are those of `CASES` in cases.py.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import defaultdict
from dataclasses import dataclass, field

import torch

import vlm_fix
from tests.support import families
from tests.support.cases import ALL
from tests.support.models import BUILD, IMAGE, PAD, VIDEO, make_inputs, single, tiny_llava
from tests.support.references import attention as edits
from tests.support.references import base as ref
from tests.support.run import error, greedy
from vlm_fix.attention import function
from vlm_fix.recorder import Done
from vlm_fix.wing import engine_of

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # largest difference of logits, relative to the largest logit
EDIT = 6e-2  # the least that an edit must change them by
BAND = 3e-2  # in bf16 a gate may fall the other way where its value is this close to the threshold, relative to it
FAMILIES = ["llava", "qwen2_5_vl", "gemma3", "mistral"]
WINDOWS = {"gemma3": 24, "mistral": 60}  # columns of their sliding windows
COSINE = {
    "llava": 0.2,
    "qwen2_5_vl": 0.21,
    "gemma3": 0.19,
    "mistral": 0.2,
    "video": 0.2,
}  # random weights have no sinks

MOVED = {  # what stands in a method's specs in one family: random weights differ
    ("llava", "memvr"): {"threshold": 0.93},  # between the entropies that there are
    ("gemma3", "memvr"): {"threshold": 0.25},
    ("mistral", "memvr"): {"threshold": 0.88},
    ("llava", "hulluedit"): {"prior_rank": 4},  # singular values that bf16's rounding does not mix with the next
    ("qwen2_5_vl", "hulluedit"): {"rank": 3, "prior_rank": 2},  # its image tokens differ little
    ("gemma3", "farsight"): {
        "slopes": "alibi",
        "sigma": 0.6,
    },  # a norm behind attention undoes what all heads lose alike
    ("gemma3", "hulluedit"): {"pcr_threshold": 0.16},  # between the shares that there are
}


@dataclass
class Prompt:
    """One prompt, and what references look at besides: in float64, or with `given` in the engine's own numbers."""

    family: str
    model: torch.nn.Module
    inputs: dict
    gates: ref.Gates = field(default_factory=ref.Gates)
    given: Seen | None = None

    @property
    def at(self):
        ids = self.inputs["input_ids"]
        return {
            "visual": ref.visual_columns(ids),
            "prompt_len": ids.shape[1],
            "gates": self.gates,
            "given": self.given,
        }

    def moved(self, method, **values):
        """The values of a method's spec, as they are in this family."""
        return values | {k: v for k, v in MOVED.get((self.family, method), {}).items() if k in values}

    @property
    def windows(self):
        """{layer: columns a sliding window holds}"""
        layers = {"gemma3": (0, 2), "mistral": ALL}.get(self.family, ())
        return dict.fromkeys(layers, WINDOWS.get(self.family))

    def text(self):
        """{layer: per-head outputs [H, D] of the prompt's last token without its images}"""
        if self.given:
            return {layer: self.given.text(layer) for layer in range(4)}
        return ref.text_only_outputs(self.model, self.inputs, range(4))

    def encoder(self):
        layers = {"qwen2_5_vl": (1, 3)}.get(self.family, (0, 2))
        return edits.encoder_scores(self.given.model if self.given else self.model, self.inputs, layers)

    def grids(self):
        """Per image (height, width) in tokens."""
        if "image_grid_thw" in self.inputs:
            return [(h // 2, w // 2) for _, h, w in self.inputs["image_grid_thw"].tolist()]
        return [(3, 3) if self.family == "gemma3" else (6, 6)] * len(self.inputs["pixel_values"])

    def secondary(self, more, fewer):
        states = self.given.states() if self.given else self.states()
        return edits.secondary(self.gates, states, self.inputs["input_ids"].shape[1], COSINE[self.family], more, fewer)

    def states(self):
        """Inputs [L, C] of all layers and the final norm's output, in a plain pass."""
        run, kept = ref.Reference([], 0, []), []
        hook = ref.decoder(self.model).norm.register_forward_hook(lambda m, a, o: kept.append(o[0]))
        ref.teacher_forced(self.model, run, self.inputs, self.inputs["input_ids"][0, :0])
        hook.remove()
        return [*(run.inputs[i] for i in range(4)), *kept]


@dataclass
class Seen:
    """What the engine had of one row of a batch, without its padding, as float64."""

    model: torch.nn.Module
    chunks: dict
    row: int
    padding: int
    plain: bool = False  # of a pass without edits over the prompt

    @property
    def dtype(self):
        return self.chunks["projected", 0][0][0].dtype

    def _joined(self, name, layer, dim):
        chunks = self.chunks[name, layer]
        if not chunks and name.startswith("plain "):  # the pass ended before: nobody reads what the reference has there
            chunks = self.chunks[name.removeprefix("plain "), layer][:1]
        for earlier in self.chunks.get((f"plain {name}", layer), ()):  # rows from which the forward itself went on
            if (count := earlier[0].shape[dim] - chunks[0][0].shape[dim]) > 0:
                chunks = [tuple(x.narrow(dim, 0, count) for x in earlier), *chunks]
        parts = [torch.cat(parts, dim) for parts in zip(*chunks, strict=True)]
        return [part[self.row].narrow(dim - 1, self.padding, part.shape[dim] - self.padding).double() for part in parts]

    def projected(self, layer):
        """Queries, keys and values [H, L, D]."""
        return self._joined("plain projected" if self.plain else "projected", layer, 2)

    def inputs(self, layer):
        """[L, C]"""
        return self._joined("plain inputs" if self.plain else "inputs", layer, 1)[0]

    def text(self, layer):
        """[H, D], of the last row of a pass that only looks."""
        return self.chunks["plain outputs", layer][0][0][self.row, -1].double()

    def states(self):
        return [self._joined("plain inputs", layer, 1)[0] for layer in range(5)]


@contextlib.contextmanager
def recorded(model, monkeypatch):
    """-> {(name, layer): [tensors of one forward, ...]} of the model's runs in this block; wrap it inside."""
    chunks, original, layers = defaultdict(list), function.attention, ref.decoder(model).layers

    def plain():
        return engine_of(model).session.plain

    def attention(module, query, key, value, *args, **kwargs):
        new = slice(-query.shape[2], None)
        if plain():
            chunks["plain projected", module.layer_idx].append((query, key, value))
        try:
            out = original(module, query, key, value, *args, **kwargs)
        except Done:  # the pass ends in this layer
            out = function.sdpa_attention_forward(module, query, key, value, *args, **kwargs)
            chunks["plain outputs", module.layer_idx].append((out[0],))
            raise
        if plain():
            chunks["plain outputs", module.layer_idx].append((out[0],))
        else:
            chunks["projected", module.layer_idx].append((query, key[:, :, new], value[:, :, new]))
        return out

    def note(i, x):
        chunks["plain inputs" if plain() else "inputs", i].append((x.clone(),))

    hooks = [
        layer.register_forward_pre_hook(
            lambda m, a, k, i=i: note(i, a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        for i, layer in enumerate(layers)
    ]
    hooks.append(ref.decoder(model).norm.register_forward_hook(lambda m, a, o: note(4, o)))
    with monkeypatch.context() as patch:
        patch.setattr(function, "attention", attention)
        try:
            yield chunks
        finally:
            for hook in hooks:
                hook.remove()


REFUSED = {
    ("video", "paint"): "no video",
    ("video", "cca"): "no video",
    ("gemma3", "paint"): "cannot in gemma3",
    ("gemma3", "cca"): "use cca:mask=false",
    ("mistral", "cca"): "use cca:mask=false",
}


def mistral(dtype, seed=0):
    """LLaVA with a Mistral decoder: one key head, a sliding window in every layer."""
    from transformers import MistralConfig

    return tiny_llava(dtype, seed, kv_heads=1, config=MistralConfig, sliding_window=WINDOWS["mistral"])


@functools.cache
def pair(family, dtype):
    """The model and its float64 twin. Smaller weights in the decoder keep bf16's own error below half of LIMIT."""
    build = {
        **BUILD,
        "video": BUILD["qwen2_5_vl"],
        "mistral": mistral,
        "gemma3": lambda dtype: families.build("gemma3", dtype),
    }[family]
    model = build(dtype)
    for name, p in ref.decoder(model).named_parameters():
        if p.dim() > 1 and "embed" not in name and family != "gemma3":
            p.data.mul_(0.6)
    return model, ref.double(model)


def prompts(family, dtype):
    """A left-padded batch and each of its rows alone; they show one image and two, or a video and an image and a video."""
    seed, images = {"qwen2_5_vl": 0, "mistral": 4}.get(family, 3), [1, 2]  # images that have summary tokens, for PAINT
    if family == "gemma3":
        batch, *rows = (families.prompt(family, images, rows=rows) for rows in (None, [0], [1]))
    elif family == "video":
        batch, *rows = (videos(rows) for rows in ([0, 1], [0], [1]))
    else:
        kind = "llava" if family == "mistral" else family
        batch = make_inputs(kind, images, seed)
        rows = [single(kind, images, i, seed) for i in (0, 1)]
    for inputs in (batch, *rows):
        inputs |= {name: inputs[name].to(dtype) for name in {"pixel_values", "pixel_values_videos"} & inputs.keys()}
    return batch, rows


def videos(rows):
    """Prompts of Qwen2.5-VL: a video of two pairs of frames; an image and a video."""
    g, made = torch.Generator().manual_seed(3), []
    for shown in ([(VIDEO, 2, 4, 6)], [(IMAGE, 1, 6, 6), (VIDEO, 2, 4, 4)]):
        ids, pixels = [1, *torch.randint(3, 80, (3,), generator=g).tolist()], []
        for token, t, h, w in shown:
            pixels.append((token, [t, h, w], torch.randn(t * h * w, 3 * 2 * 16, generator=g)))
            ids += [93, *[token] * (t * h * w // 4), 94, *torch.randint(3, 80, (4,), generator=g).tolist()]
        made.append((ids, pixels))
    width = max(len(made[i][0]) for i in rows)
    ids = torch.tensor([[PAD] * (width - len(made[i][0])) + made[i][0] for i in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    for token, values, grid in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        own = [p for i in rows for p in made[i][1] if p[0] == token]
        if own:
            inputs |= {values: torch.cat([p[2] for p in own]), grid: torch.tensor([p[1] for p in own])}
    inputs["second_per_grid_ts"] = torch.ones(len(inputs["video_grid_thw"]))
    inputs["mm_token_type_ids"] = ref.modalities(ids, inputs)
    return inputs


@torch.no_grad()
def unwrapped(model, inputs, answer):
    """Logits of the model without a method for the same tokens, in its own precision."""
    ids = torch.cat([inputs["input_ids"], answer[None]], dim=1)
    full = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    full |= {k: ref.modalities(ids, inputs) for k in ("token_type_ids", "mm_token_type_ids") if k in inputs}
    model.model.rope_deltas = None
    return model(**full, use_cache=False).logits[0, inputs["input_ids"].shape[1] - 1 :]


def check(spec, make, family, dtype, monkeypatch, record_property):
    """In bf16 the reference follows the decisions that its own loops take from the engine's queries, keys and inputs."""
    model, twin = pair(family, dtype)
    batch, rows = prompts(family, dtype)
    if isinstance(spec, str):
        for name, value in MOVED.get((family, spec.partition(":")[0]), {}).items():
            spec = re.sub(rf"\b{name}=[^,]*", f"{name}={value}", spec)
    with recorded(model, monkeypatch) as chunks, vlm_fix.wrapped(model, spec):
        tokens, logits, _ = greedy(model, batch, suppress_tokens=[IMAGE, VIDEO])  # the reference would look for them
    flips, decisions, changes = [], [], []
    for i, inputs in enumerate(rows):
        gates, answer = ref.Gates(), tokens[i, :-1]
        if dtype == torch.bfloat16:
            seen = Seen(model, chunks, i, int((batch["attention_mask"][i] == 0).sum()))
            make(Prompt(family, twin, inputs, gates, seen)).forward(twin, inputs, answer)
            gates = ref.Gates(taken=gates.own)
        expected = make(Prompt(family, twin, inputs, gates)).forward(twin, inputs, answer)
        flips, decisions = flips + gates.flips, decisions + list(gates.own.values())
        assert gates.margin > 1e-6 or dtype == torch.bfloat16, "pick another seed: a gate lies on its threshold"
        assert error(logits[i], expected) < LIMIT[dtype]
        changes.append(error(unwrapped(model, inputs, answer), expected))
    assert max(changes) > EDIT, "the edit must be larger than the limit: without it this test must fail"
    if any(isinstance(d, bool) for d in decisions):
        assert True in decisions and False in decisions, "gates must fall both ways"
    farthest = max(flips, default=0)
    record_property("gate_flips", (len(flips), len(decisions), farthest))
    assert farthest < BAND and len(flips) <= 0.1 * len(decisions), (len(flips), len(decisions), farthest)
