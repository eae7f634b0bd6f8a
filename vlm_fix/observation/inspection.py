"""inspect: what each layer would say, what an answer's tokens hang on, and where the image enters, token by token.

Prompt and answer run in one forward (teacher forcing); row t is the one that predicts answer token t. No map holds more than
rows x columns of the answer, never L x L.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vlm_fix.attention.edits import WeightReader
from vlm_fix.call import Call
from vlm_fix.decoding import ProcedureWing
from vlm_fix.decoding.head import Head
from vlm_fix.engine import Engine
from vlm_fix.errors import VlmFixError
from vlm_fix.families import attention_modules, prompt_positions
from vlm_fix.hooks import hooked
from vlm_fix.packing import by_token
from vlm_fix.pruning import PruningWing
from vlm_fix.recorder import Recorder
from vlm_fix.rows import Rows
from vlm_fix.session import Session
from vlm_fix.wing import ATTRIBUTE, installed

from .causal import Effects, causal_effects
from .observe import observe

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; tensors lie on the CPU. n answer tokens; K = L + n - 1 columns, those that the last row sees."""

    ids: torch.Tensor  # [K + 1] the prompt and the answer
    visual: torch.Tensor  # [K] bool, the image columns
    prompt_len: int  # L
    lens_tokens: (
        torch.Tensor
    )  # [layers + 1, n, k] what the input of each layer would say, the last one is the answer's own
    lens_p: torch.Tensor  # [layers + 1, n, k] with which probability
    lens_own: torch.Tensor  # [layers + 1, n] the probability of the answer's token there
    saliency: torch.Tensor | None  # [layers, n, K] mean over heads of |A dL/dA|, L = -log p of the row's token
    rollout: torch.Tensor | None  # [n, K] attention rollout of the rows
    copying: torch.Tensor  # [layers, heads] share of rows whose largest weight lies on the token they predict
    looking: torch.Tensor  # [layers, heads] share of rows whose largest weight lies on an image column
    image_mass: torch.Tensor  # [layers, heads] weight on image columns, mean over rows
    phi: torch.Tensor  # [layers] the largest |x_d| / rms(x) of a column that enters the layer
    sinks: torch.Tensor  # [layers, 2] sink columns: text, image
    sink_mass: torch.Tensor  # [layers] weight on sink columns, mean over heads and rows
    effects: Effects | None  # the causal map of one token; if asked for

    @property
    def tokens(self) -> torch.Tensor:
        """[n] the answer."""
        return self.ids[self.prompt_len :]

    def appears(self, t: int) -> int | None:
        """The first layer from whose input on token t is what the lens would say; None if only the logits say it."""
        first = (self.lens_tokens[:, t, 0] == self.tokens[t]).long().flip(0).cumprod(dim=0).sum()
        layer = len(self.lens_tokens) - int(first)
        return layer if layer < len(self.lens_tokens) - 1 else None


@dataclass(frozen=True)
class _Salient(WeightReader):
    """Reads weights as leaves of the graph, or parts of it."""

    name: ClassVar[str] = "saliency_reader"
    needs_image: ClassVar[bool] = False

    def read_weights(self, weights: torch.Tensor, rows: Rows) -> None:
        if torch.is_grad_enabled():
            kept = weights if weights.requires_grad else weights.requires_grad_()
            rows.session.whole.part(_Weights).by_layer.setdefault(rows.layer, []).append((rows.positions, kept))


@dataclass
class _Weights:
    """A session part: (positions [r], A [1, H, r, K]) by layer, chunk by chunk."""

    by_layer: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)


class Teacher:
    """Runs a prompt and the answer after it in one forward of a wrapped model."""

    def __init__(self, engine: Engine, inputs: dict[str, Any], answer: torch.Tensor):
        self.engine, self.call = engine, Call(engine.model, engine.family, dict(inputs))
        procedures = engine.wing(ProcedureWing)
        if procedures:
            with torch.no_grad():
                procedures.refine(self.call)
        given = self.call.inputs
        self.length, self.answer, count = given["input_ids"].shape[1], answer, len(answer) - 1
        positions, following = prompt_positions(engine.model, engine.family, given)
        more = (following[:, None] + torch.arange(count, device=following.device)).to(positions)
        more = more.expand(3, -1, -1) if engine.family.mrope and positions.dim() == 3 else more
        values = {"input_ids": answer[None, :-1], "attention_mask": torch.ones_like(answer[None, :-1])}
        self.inputs = dict(given)
        for name in by_token(given):
            new = values.get(name, torch.zeros_like(answer[None, :-1]))
            self.inputs[name] = torch.cat([given[name], new.to(given[name])], dim=1)
        self.inputs["position_ids"] = torch.cat([positions, more], dim=-1)
        self.session: Session | None = None

    def logits(self, recorder: Recorder | None = None) -> torch.Tensor:
        """[n, V] of the rows that predict the answer; `session` is that of the forward."""
        engine, base = self.engine, self.engine.base
        deltas = getattr(base, "rope_deltas", None)
        engine.call, engine.recorder = self.call, recorder
        try:
            out = engine.model(**self.inputs, use_cache=False, logits_to_keep=len(self.answer))
            self.session = engine.main
        finally:
            engine.call = engine.session = engine.main = engine.recorder = None
            if hasattr(base, "rope_deltas"):
                base.rope_deltas = deltas
        return out.logits[0].float()


def inspect(
    model: Any,
    inputs: dict[str, Any],
    answer_ids: Any,
    *,
    top: int = 5,
    saliency: bool = True,
    rollout: bool = True,
    residual: float = 0.5,
    causal: int | None = None,
    noise: float = 3.0,
    seed: int = 0,
    progress: Progress = lambda what, share: None,
) -> Inspection:
    """Look into a model while it says a given answer (as `observe` takes it) to one prompt with at least one image.

    Logit lens (nostalgebraist, 2020): the final norm and the language head on each layer's input; `top` tokens are kept.
    saliency (LVLMs-Saliency, arXiv 2601.20279): one backward pass a token, memory of one forward with gradients. rollout
    (Abnar and Zuidema, 2020): e_r prod_l (residual I + (1 - residual) mean_h A_l), from the last layer down, one forward a
    layer. causal: the answer token whose causal map is traced (FCCT, see `causal_effects`), with Gaussian noise of `noise` times
    the pixels' own deviation; three forwards for each layer and token of the text. A head copies (Wu et al., 2024) where its
    largest weight lies on the token that comes next. On a wrapped model all but the causal map, and the second branch of a
    contrast, sees the methods. Raises VlmFixError for a batch, an empty answer, or a pruner beside it.
    """
    given = {k: v for k, v in dict(inputs).items() if isinstance(v, torch.Tensor)}
    seen = observe(model, given, answer_ids)
    given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    answer = seen.tokens.to(given["input_ids"].device)
    if not len(answer):
        raise VlmFixError("inspect looks at the tokens of an answer, and got none: pass answer_ids.")
    with _engine(model, saliency) as engine:
        if engine.wing(PruningWing):
            raise VlmFixError("inspect needs every token in every layer: unwrap the pruner, or use observe.")
        teacher, depth = Teacher(engine, given, answer), engine.arch.depth
        with torch.no_grad():
            tops = Tops(seen.sinks, teacher)
            tokens, p, own = lens(engine, teacher, top, tops)
        salient = saliencies(engine, teacher, progress) if saliency else None
        with torch.no_grad():
            rolled = rollouts(engine, teacher, residual, progress) if rollout else None
            effects = None
            if causal is not None:
                if not 0 <= causal < len(answer):
                    raise VlmFixError(
                        f"there is no answer token {causal} to trace: they count from 0 to {len(answer) - 1}."
                    )
                effects = causal_effects(
                    engine, teacher.inputs, teacher.length - 1 + causal, int(answer[causal]), noise, seed, progress
                )
        ids = torch.cat([teacher.inputs["input_ids"][0], answer[-1:]]).cpu()
        text = ~tops.visual
        return Inspection(
            ids=ids,
            visual=tops.visual,
            prompt_len=teacher.length,
            lens_tokens=tokens,
            lens_p=p,
            lens_own=own,
            saliency=salient,
            rollout=rolled,
            copying=tops.table(tops.copies, depth),
            looking=tops.table(tops.looks, depth),
            image_mass=tops.table(tops.mass, depth),
            phi=seen.phi.amax(dim=1),
            sinks=torch.stack([(tops.sinks & text).sum(dim=1), (tops.sinks & ~text).sum(dim=1)], dim=1),
            sink_mass=tops.table(tops.on_sinks, depth).mean(dim=1),
            effects=effects,
        )


@contextlib.contextmanager
def _engine(model: Any, reads: bool) -> Iterator[Engine]:
    """The methods that are on the model, and the reader of weights, on an engine for as long as this lasts."""
    before = installed(model)
    methods = list(before.methods) if before else []
    with contextlib.ExitStack() as stack:
        if before:
            stack.enter_context(before.away())
        engine = Engine(before.model if before else model, [*methods, *([_Salient()] if reads else [])])
        engine.install(idle=True)
        stack.callback(engine.remove)
        vars(engine.model)[ATTRIBUTE] = engine
        stack.callback(vars(engine.model).pop, ATTRIBUTE)
        yield engine


class Tops(Recorder):
    """Of the rows that predict the answer: where each head's largest weight lies, and its weight on image and sinks."""

    def __init__(self, sinks: torch.Tensor, teacher: Teacher):
        ids = teacher.inputs["input_ids"][0]
        self.next, self.ids, self.first = teacher.answer, ids, teacher.length - 1
        self.visual = torch.isin(ids, teacher.engine.tokens.to(ids.device)).cpu()
        self.visual[teacher.length :] = False  # an image token that the model writes shows no image
        self.sinks = sinks[:, : len(ids)]
        self.copies, self.looks, self.mass, self.on_sinks = (dict[int, list[torch.Tensor]]() for _ in range(4))

    def first_row(self, session: Session) -> int:
        return self.first

    def weights(self, layer: int, session: Session, first: int, weights: torch.Tensor, i: int) -> None:
        start = first + i - self.first
        a = weights[0, :, max(-start, 0) :]  # [H, r, K]; a method may have rows before
        if not a.shape[1]:
            return
        a = torch.nn.functional.pad(a, (len(self.ids) - a.shape[-1], 0))  # what a window has left behind
        place, start = a.argmax(dim=-1), max(start, 0)
        visual, sinks = self.visual.to(a.device), self.sinks[layer].to(a.device)
        copied = (self.ids[place] == self.next[start : start + a.shape[1]]) & ~visual[place]
        for kept, x in (
            (self.copies, copied),
            (self.looks, visual[place]),
            (self.mass, a[..., visual].sum(dim=-1)),
            (self.on_sinks, a[..., sinks].sum(dim=-1)),
        ):
            kept.setdefault(layer, []).append(x.float().cpu())

    def table(self, kept: dict[int, list[torch.Tensor]], depth: int) -> torch.Tensor:
        """[layers, heads] means over rows; 0 in layers without attention weights."""
        means = {i: torch.cat(parts, dim=1).mean(dim=1) for i, parts in kept.items()}
        heads = max(map(len, means.values()))
        return torch.stack(
            [
                torch.nn.functional.pad(m, (0, heads - len(m)))
                if (m := means.get(i)) is not None
                else torch.zeros(heads)
                for i in range(depth)
            ]
        )


def lens(
    engine: Engine, teacher: Teacher, top: int, recorder: Recorder
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per layer input, and last the logits: top tokens [layers + 1, n, k], their p, and p [layers + 1, n] of the answer's."""
    head, rows, count = Head(engine), dict[int, torch.Tensor](), len(teacher.answer)

    def see(i: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows[i] = (args[0] if args else kwargs["hidden_states"])[0, -count:].detach()

    layers = engine.language.layers
    hooks = [x.register_forward_pre_hook(functools.partial(see, i), with_kwargs=True) for i, x in enumerate(layers)]
    with hooked([*hooks, *head.hooks()]):
        logits = teacher.logits(recorder)
    tokens, p, own = [], [], []
    for i in range(len(layers) + 1):
        z = logits if i == len(layers) else head(rows[i], norm=True).float()
        q = z.softmax(dim=-1)
        values, best = q.topk(min(top, q.shape[1]), dim=-1)
        tokens.append(best.cpu())
        p.append(values.cpu())
        own.append(q.gather(1, teacher.answer[:, None].to(q.device))[:, 0].cpu())
    return torch.stack(tokens), torch.stack(p), torch.stack(own)


def saliencies(engine: Engine, teacher: Teacher, progress: Progress) -> torch.Tensor:
    """[layers, n, K] mean over heads of |A dL_t/dA| in the row that predicts token t, L_t = -log p(t)."""
    count, width = len(teacher.answer), teacher.inputs["input_ids"].shape[1]
    found = torch.zeros(engine.arch.depth, count, width)
    weights = [w for w in engine.model.parameters() if w.requires_grad]
    for w in weights:
        w.requires_grad_(False)
    try:
        with torch.enable_grad():
            log_p = teacher.logits().log_softmax(dim=-1)
            assert teacher.session is not None
            read = teacher.session.part(_Weights).by_layer
            for t, token in enumerate(teacher.answer.tolist()):
                place, chosen = teacher.length - 1 + t, list[tuple[int, int, torch.Tensor]]()
                for layer, chunks in read.items():
                    for positions, a in chunks:
                        at = place - int(positions[0])
                        if 0 <= at < len(positions):
                            chosen.append((layer, at, a))
                grads = torch.autograd.grad(
                    -log_p[t, token], [a for *_, a in chosen], retain_graph=True, allow_unused=True
                )
                for (layer, at, a), grad in zip(chosen, grads, strict=True):
                    if grad is not None:
                        s = (a[0, :, at] * grad[0, :, at]).detach().abs().mean(dim=0)
                        found[layer, t, width - len(s) :] = s.cpu()
                progress("saliency", (t + 1) / count)
    finally:
        for w in weights:
            w.requires_grad_(True)
    return found


class Rolled(Recorder):
    """One layer's step of a rollout: v [n, K] -> sum_r v_r mean_h A[r]."""

    def __init__(self, layer: int, v: torch.Tensor):
        self.layers, self.v, self.new = (layer,), v, torch.zeros_like(v)

    def first_row(self, session: Session) -> int:
        return 0

    def weights(self, layer: int, session: Session, first: int, weights: torch.Tensor, i: int) -> None:
        a = weights[0].mean(dim=0).to(self.v)
        self.new[:, self.v.shape[1] - a.shape[1] :] += self.v[:, first + i : first + i + len(a)] @ a


def rollouts(engine: Engine, teacher: Teacher, residual: float, progress: Progress) -> torch.Tensor:
    """[n, K] the rows e_r of the answer, times residual I + (1 - residual) mean_h A of each layer, from the last one down."""
    width, count = teacher.inputs["input_ids"].shape[1], len(teacher.answer)
    v = torch.eye(width)[-count:]
    layers = sorted(attention_modules(engine.language), reverse=True)
    for number, layer in enumerate(layers, 1):
        step = Rolled(layer, v)
        teacher.logits(step)
        v = residual * v + (1 - residual) * step.new
        progress("rollout", number / len(layers))
    return v
