"""observe: what a model attends to while it answers, without ever forming an L x L matrix."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from vlm_fix.call import Call
from vlm_fix.decoding import ProcedureWing
from vlm_fix.engine import Engine
from vlm_fix.errors import VlmFixError
from vlm_fix.families import prompt_positions, visual_cells
from vlm_fix.families.compat import with_cache
from vlm_fix.hidden.wing import writers
from vlm_fix.packing import pad_to
from vlm_fix.pruning import PruningWing
from vlm_fix.pruning.kinds import ImageShrinker
from vlm_fix.pruning.pruners import Pruners
from vlm_fix.recorder import LastHeads, Recorder
from vlm_fix.session import PAD, VISUAL, Session, View
from vlm_fix.tensors import one_stream
from vlm_fix.wing import bare, installed

from . import show
from .answer import answer_of
from .layers import by_layer, visual_of


@dataclass(frozen=True, repr=False)
class Observation:
    """Attention of the rows that predict an answer; all tensors lie on the CPU.

    Row r predicts `tokens[r]`: row 0 is the prompt's last, the last row predicts what would come next (rows = n + 1 for
    n answer tokens). Columns are those that enter the language model: with a pruner, fewer than the prompt had. Masses are
    sums of post-softmax weights as the wrapped methods left them; system is text before the first image, text is text
    after the last one, the answer included. A hybrid decoder's layers without attention weights hold zeros.
    """

    tokens: torch.Tensor  # [n] the answer
    visual_mass: torch.Tensor  # [layers, heads, rows]
    system_mass: torch.Tensor  # [layers, heads, rows]
    text_mass: torch.Tensor  # [layers, heads, rows]
    weights_to_image: torch.Tensor  # [layers, heads, rows, N]: the image tokens of the prompt; 0 where pruned
    kept: torch.Tensor  # [layers, N] bool, False where a pruner dropped the image token before this layer
    phi: torch.Tensor  # [layers, columns] largest |x_d| / rms(x) of a layer's input x, over all or the given dimensions
    sinks: torch.Tensor  # [layers, columns] bool, phi > tau
    image_sinks: torch.Tensor  # [layers, N] bool, the sinks among the image tokens
    cells: tuple[torch.Tensor, ...]  # per image or video frame [h, w]: which of the N tokens shows this patch, -1: none
    heads: torch.Tensor  # [layers, heads, D] head outputs before o_proj on the prompt's last row
    heads_text: torch.Tensor | None  # [layers, heads, D] the same without the images, methods off; if asked for
    attention_norm: torch.Tensor  # [layers, rows] norm of what attention adds to the residual stream
    mlp_norm: torch.Tensor  # [layers, rows] the same of the MLP
    attention_output: torch.Tensor | None  # [layers, rows, C] what attention adds; if asked for
    mlp_output: torch.Tensor | None  # [layers, rows, C] the same of the MLP
    question_to_image: torch.Tensor | None  # [layers, heads, Q, N]: the prompt's Q rows after the images; if asked for
    column_sums: torch.Tensor | None  # [layers, heads, columns] what all rows, the prompt's too, give; if asked for

    def __repr__(self) -> str:
        return show.short(self)

    def plot(self, rows: Any = None, *, image: Any = None, tokenizer: Any = None, **chosen: Any) -> Any:
        """The heatmaps of `rows`, a number or several (default: the answer's first), on one scale, as a matplotlib Figure.

        image: the picture to lay them over. tokenizer: the processor, to write each row's token above it. chosen: layers,
        heads and sinks as for `heatmap`, and index, the image of several. Raises VlmFixError as `heatmap` does.
        """
        return show.plot(self, rows, image, tokenizer, **chosen)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(h, w) in visual tokens, image by image."""
        return [(c.shape[0], c.shape[1]) for c in self.cells]

    @property
    def vas(self) -> float:
        """AVAR's visual attention score (arXiv 2603.03825): attention to the image in units of that to the system text.

        Sums over layers, heads and rows, A[V] over A[S]. The paper averages the ratios of single heads and rows; one head that
        all but ignores S then outweighs all others (8e9 on one model), so the sums are divided here. Rows of a layer whose
        sliding window has passed S are left out. Raises VlmFixError where no row sees any.
        """
        seen = self.system_mass > 0
        if not seen.any():
            raise VlmFixError("VAS needs text before the image, of which no row sees any here: use visual_mass.")
        return float(self.visual_mass[seen].double().sum() / self.system_mass[seen].double().sum())

    @property
    def divergence(self) -> torch.Tensor:
        """[layers, heads] VHR's head divergence (arXiv 2412.13949): || A_i(image) - A_i(text only) ||_2."""
        if self.heads_text is None:
            raise VlmFixError("head divergence needs a pass without images: call observe(..., text_only=True).")
        return (self.heads - self.heads_text).norm(dim=-1)

    def heatmap(
        self,
        row: int,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        sinks: bool = True,
        image: int = 0,
    ) -> torch.Tensor:
        """[h, w] float32: weight of `row` on each patch, mean over `layers` and `heads` (None: all).

        sinks=False sets each layer's sink columns to 0. Raises VlmFixError for an image, row, layer or head there is not.
        """
        if not self.cells:
            raise VlmFixError("the image tokens of this model show no certain patch, so there is no map of them.")
        depth, count, rows, _ = self.weights_to_image.shape
        for what, chosen, size in (
            ("image", [image], len(self.cells)),
            ("row", [row], rows),
            ("layer", layers or (), depth),
            ("head", heads or (), count),
        ):
            if wrong := [i for i in chosen if not -size <= i < size]:
                raise VlmFixError(f"there is no {what} {wrong[0]}; this observation has {what}s 0 to {size - 1}.")
        weights = self.weights_to_image[:, :, row].float()
        if not sinks:
            weights = weights * ~self.image_sinks[:, None]
        if layers is not None:
            weights = weights[list(layers)]
        if heads is not None:
            weights = weights[:, list(heads)]
        cells = self.cells[image]
        return weights.mean(dim=(0, 1))[cells.clamp(min=0)] * (cells >= 0)


class Probe(Recorder):
    """Gathers an Observation layer by layer, called by the attention function and by hooks on the layers."""

    def __init__(
        self, tau: float, dims: Sequence[int] | None, dtype: torch.dtype, outputs: bool, question: bool, columns: bool
    ):
        self.tau, self.dims, self.dtype = tau, dims, dtype
        self.outputs, self.question, self.columns = outputs, question, columns
        self.parts: dict[tuple[str, int], list[torch.Tensor]] = {}
        self.sums: dict[int, torch.Tensor] = {}  # per layer [H, columns so far]

    def add(self, what: str, layer: int, x: torch.Tensor) -> None:
        self.parts.setdefault((what, layer), []).append(x.detach().cpu())

    def first_row(self, session: Session) -> int:
        """The first query row of this forward whose weights are wanted."""
        first = self.first_answering(session)
        if self.question and session.start == 0:
            first = min(first, session.last_visual[0] + 1)
        return 0 if self.columns else first

    def first_answering(self, session: Session) -> int:
        """The first query row of this forward that predicts the answer."""
        assert session.prompt_len is not None
        return max(session.prompt_len - 1 - session.start, 0)

    def weights(self, layer: int, session: Session, first: int, weights: torch.Tensor, i: int) -> None:
        """Edited weights [1, H, r, K] of the query rows from first + i on."""
        a, first = weights, first + i
        masks = session.masks(a.shape[-1], a.device)
        if self.columns:
            self.tally(layer, session, a[0], session.start + first)
        if self.question and session.start == 0:
            asking = a[0, :, max(session.last_visual[0] + 1 - first, 0) :]
            self.add("question", layer, self.on_image(asking, session, masks["visual"]))
        a = a[0, :, max(self.first_answering(session) - first, 0) :]
        if not a.shape[1]:
            return
        for name in ("visual", "before", "after"):
            self.add(name, layer, (a * masks[name][0]).sum(dim=-1).float())
        self.add("image", layer, self.on_image(a, session, masks["visual"]))

    def on_image(self, a: torch.Tensor, session: Session, visual: torch.Tensor) -> torch.Tensor:
        """a [H, r, K] -> [H, r, N], 0 on image tokens that the layer no longer has."""
        image = a[..., visual[0, 0, 0]].to(self.dtype)
        if isinstance(session, View):  # a layer with fewer columns
            held = visual_of(session).to(image.device)
            image = torch.nn.functional.pad(image, (int(held.sum()) - image.shape[-1], 0))  # a window has passed some
            image = image.new_zeros(*image.shape[:2], len(held)).masked_scatter(held, image)
        return image

    def tally(self, layer: int, session: Session, a: torch.Tensor, row: int) -> None:
        """Add the weights a [H, r, K] of the rows from `row` on to the layer's column sums; padding counts for nothing."""
        assert session.types is not None and session.whole.types is not None
        real = (session.types[0, row : row + a.shape[1]] != PAD).to(a)
        places = session.places()[0, -a.shape[-1] :].to(a.device)
        old = self.sums.get(layer, a.new_zeros(len(a), 0))
        new = pad_to(old, session.whole.types.shape[1])
        self.sums[layer] = new.index_add(1, places, (a * real[:, None]).sum(dim=1))

    def heads(self, layer: int, session: Session, outputs: torch.Tensor) -> None:
        """Head outputs [1, q, H, D] as o_proj gets them."""
        if ("heads", layer) not in self.parts:
            self.add("heads", layer, outputs[0, self.first_answering(session)].float())

    def enter(self, engine: Engine, layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Hook before a layer."""
        if engine.editing is None:
            return
        x = one_stream(args[0] if args else kwargs["hidden_states"], "observe")[0].float()
        ratio = x.abs() / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        phi = (ratio if self.dims is None else ratio[:, list(self.dims)]).amax(dim=-1)
        session = engine.editing.at(layer)
        if isinstance(session, View) and not session.start:
            index = session.index[0].to(phi.device)
            phi = phi.new_zeros(len(index) + session.dropped).scatter(0, index, phi)
        self.add("phi", layer, phi)

    def leave(self, engine: Engine, what: str, layer: int, module: Any, args: Any, output: Any) -> None:
        """Hook after the module that writes attention's or the MLP's output."""
        if engine.editing is None:
            return
        x = output[0] if isinstance(output, tuple) else output
        x = x.view(1, -1, x.shape[-1])  # some MLPs work on [tokens, C]
        x = x[0, self.first_answering(engine.editing.at(layer)) :].float()
        self.add(f"{what}_norm", layer, x.norm(dim=-1))
        if self.outputs:
            self.add(what, layer, x.to(self.dtype))

    def stack(self, what: str, depth: int, dim: int) -> torch.Tensor:
        """[layers, ...], the forwards joined along `dim`; columns outside a layer's window are 0, on the left."""
        whole = []
        some = next(parts for (name, _), parts in self.parts.items() if name == what)
        for i in range(depth):
            parts = self.parts.get((what, i)) or [torch.zeros_like(p) for p in some]  # linear attention has no weights
            width = max(p.shape[-1] for p in parts)
            if what == "image":
                parts = [torch.nn.functional.pad(p, (width - p.shape[-1], 0)) for p in parts]
            whole.append(torch.cat(parts, dim=dim))
        if what == "heads":  # layers may have heads of different sizes
            return by_layer(dict(enumerate(whole)), depth)
        return torch.stack(whole)


@torch.no_grad()
def observe(
    model: Any,
    inputs: dict[str, Any],
    answer_ids: Any = None,
    *,
    tokenizer: Any = None,
    tau: float = 20.0,
    sink_dims: Sequence[int] | None = None,
    text_only: bool = False,
    outputs: bool = False,
    question: bool = False,
    columns: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Observation:
    """Run the prompt and a given answer through `model` and note what each answer token looked at.

    inputs: the processor's output for one prompt with at least one image or video. answer_ids: generated tokens [n], what
    `generate` returned for these inputs, or text (tokenizer: its processor). It is fed as it is (teacher forcing): every
    token is computed once, and only the observed rows' weights are formed.
    On a wrapped model the edited weights are seen; a contrast's second branch and edits of the logits are not.
    tau and sink_dims: what counts as a sink (VAR's phi). text_only: also a pass without the images, for `divergence`.
    outputs: keep `attention_output` and `mlp_output`. question: also the rows after the images, for `question_to_image`.
    columns: also all other rows, a chunk at a time, for `column_sums`. dtype: of the weights on image tokens and of outputs
    (float16 halves them). Raises VlmFixError for a batch, a prompt without an image, or a method that thins out the cache
    or shrinks the image.
    """
    given = {k: v for k, v in dict(inputs).items() if isinstance(v, torch.Tensor)}
    ids = given.get("input_ids")
    if ids is None or ids.dim() != 2:
        raise VlmFixError("observe takes the processor's output: a dict with input_ids [1, L] and the images.")
    if ids.shape[0] != 1:
        raise VlmFixError(f"observe takes one prompt at a time, not a batch of {ids.shape[0]}.")
    given.setdefault("attention_mask", torch.ones_like(ids))
    model = bare(model)
    with _engine(model) as engine, engine.lock, contextlib.ExitStack() as stack:
        engine.need_image_columns(["observe"])
        pruning = engine.wing(PruningWing)
        pruners = pruning.pruners if pruning else Pruners(engine, None, None, None)
        if pruners.cacher:
            raise VlmFixError(
                f"{pruners.cacher.name} keeps other columns in every head; observe cannot tell them apart."
            )
        if isinstance(pruners.pruner, ImageShrinker):
            raise VlmFixError(f"{pruners.pruner.name} shows the model another image; observe knows this one's patches.")
        if sink_dims is not None and any(not 0 <= d < engine.arch.hidden for d in sink_dims):
            raise VlmFixError(f"sink_dims={tuple(sink_dims)} do not fit a model of hidden size {engine.arch.hidden}.")
        answer = answer_of(answer_ids, ids, model, tokenizer, engine.tokens)
        call, probe = Call(model, engine.family, given), Probe(tau, sink_dims, dtype, outputs, question, columns)
        if not bool(torch.isin(ids, engine.tokens.to(ids.device)).any()):
            raise VlmFixError(
                "observe needs an image, but the prompt contains no image token: pass images to the processor."
            )
        procedures = engine.wing(ProcedureWing)
        if procedures:
            procedures.refine(call)
        cells = visual_cells(model, engine.family, call.inputs)
        for i, layer in enumerate(engine.language.layers):
            written = writers(layer)
            hooks = [layer.register_forward_pre_hook(functools.partial(probe.enter, engine, i), with_kwargs=True)]
            hooks += [
                written[what].register_forward_hook(functools.partial(probe.leave, engine, what, i))
                for what in ("attention_output", "mlp_output")
            ]
            for hook in hooks:
                stack.callback(hook.remove)
        session = _run(engine, call, probe, answer)
        text: dict[int, torch.Tensor] = {}
        if text_only:
            engine.run_prompt(call.without_images(), LastHeads(lambda i, heads: text.__setitem__(i, heads[0].cpu())))
        return _collect(engine, call, probe, session, answer, cells, text)


@contextlib.contextmanager
def _engine(model: Any) -> Iterator[Engine]:
    """The engine on the model, or one without methods for as long as this lasts."""
    engine = installed(model)
    if engine and engine.installed:
        yield engine
        return
    engine = Engine(model, [])
    engine.install(idle=True)
    try:
        yield engine
    finally:
        engine.remove()


def _run(engine: Engine, call: Call, probe: Probe, answer: torch.Tensor) -> Session:
    """Prompt and answer through the model, in two forwards over one cache."""
    base, model = engine.base, engine.model
    cache, deltas = DynamicCache(config=model.config.get_text_config()), getattr(base, "rope_deltas", None)
    positions, following = prompt_positions(model, engine.family, call.inputs)
    engine.call, engine.recorder = call, probe
    try:
        more = {"position_ids": positions, "use_cache": True, "logits_to_keep": 1}
        model(**with_cache({**call.inputs, **more}, cache))
        session = engine.sessions[cache]
        if len(answer):
            mask = call.inputs["attention_mask"]
            positions = (following[:, None] + torch.arange(len(answer), device=mask.device)).to(positions)
            if engine.family.mrope:
                positions = positions.expand(3, -1, -1)
            mask = torch.cat([mask, mask.new_ones(1, len(answer))], dim=1)
            inputs = {**more, "input_ids": answer[None], "attention_mask": mask, "position_ids": positions}
            model(**with_cache(inputs, cache))
        return session
    finally:
        engine.call = engine.session = engine.main = engine.recorder = None
        if deltas is not None or hasattr(base, "rope_deltas"):
            base.rope_deltas = deltas


def _collect(
    engine: Engine,
    call: Call,
    probe: Probe,
    session: Session,
    answer: torch.Tensor,
    cells: list[torch.Tensor],
    text: dict[int, torch.Tensor],
) -> Observation:
    depth = engine.arch.depth
    assert session.types is not None
    types = session.types[0].cpu()
    prompt = engine.classify(call.inputs["input_ids"])[0].cpu() == VISUAL
    entered = torch.ones(int(prompt.sum()), dtype=torch.bool)
    if session.kept is not None:
        places = torch.zeros_like(prompt).index_fill(
            0, session.kept.index[0].cpu()[session.kept.mask[0].cpu() > 0], True
        )
        entered = places[prompt]

    def spread(x: torch.Tensor) -> torch.Tensor:  # over all image tokens of the prompt
        return x if entered.all() else x.new_zeros(*x.shape[:-1], len(entered)).masked_scatter(entered, x)

    held = [session.at(i) for i in range(depth)]
    count = int((types == VISUAL).sum())

    phi = probe.stack("phi", depth, 0)
    phi = phi.masked_fill(types == PAD, 0)
    sinks = phi > probe.tau
    return Observation(
        tokens=answer.cpu(),
        visual_mass=probe.stack("visual", depth, 1),
        system_mass=probe.stack("before", depth, 1),
        text_mass=probe.stack("after", depth, 1),
        weights_to_image=spread(probe.stack("image", depth, 1)),
        kept=spread(
            torch.stack([visual_of(v).cpu() if isinstance(v, View) else torch.ones(count).bool() for v in held])
        ),
        phi=phi,
        sinks=sinks,
        image_sinks=spread(sinks[:, types == VISUAL]),
        cells=tuple(cells),
        heads=probe.stack("heads", depth, 0),
        heads_text=by_layer(text, depth) if text else None,
        attention_norm=probe.stack("attention_output_norm", depth, 0),
        mlp_norm=probe.stack("mlp_output_norm", depth, 0),
        attention_output=probe.stack("attention_output", depth, 0) if probe.outputs else None,
        mlp_output=probe.stack("mlp_output", depth, 0) if probe.outputs else None,
        question_to_image=spread(probe.stack("question", depth, 1)) if probe.question else None,
        column_sums=by_layer({i: x.cpu() for i, x in probe.sums.items()}, depth) if probe.columns else None,
    )
