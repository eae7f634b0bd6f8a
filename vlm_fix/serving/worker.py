"""What the plugin keeps on one of vLLM's workers: the engines of its methods, and the requests that are running."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.session import TEXT, VISUAL, Session

from . import layers, options, refusals
from .beside import Beside
from .engine import ServedEngine
from .groups import Group, Looks
from .logits import NextTokens
from .paged import Room, layout_of
from .sessions import BatchSession, LastRows, RequestSession, WholePrompts, session_of
from .settings import Settings
from .tower import Images

MOST = 64  # engines with other strengths that are kept
log = logging.getLogger("vllm.vlm_fix")
_SERVED: weakref.WeakValueDictionary[int, Served]


@dataclass
class Request:
    """One request on the worker."""

    engine: ServedEngine
    session: RequestSession
    branches: dict[str, Any] = field(default_factory=dict)  # logits.BranchLine by name
    seen: int = 0  # columns that were computed
    unprepared: bool = False  # an InputEdit has still to look at its images
    in_pieces: bool = False  # its prompt came in pieces, though a method needs it whole


class Served:
    """One worker's part. `running` is True while it runs a step of requests (and not a profiling run)."""

    def __init__(self, runner: Any, settings: Settings, model: Any):
        self.runner, self.settings, self.model = runner, settings, model
        self.engine = self.adopt(ServedEngine.plan(model, settings))
        refusals.check_engine(self.engine)
        refusals.check_worker(runner, self.engine)
        self.variants: dict[Any, ServedEngine] = {}
        self.requests: dict[str, Request] = {}
        self.batches: dict[ServedEngine, BatchSession] = {}
        self.running, self.groups, self.current = False, [], None
        self.numbers: dict[str, int] = {}
        self.window: int | None = None  # the smallest of the layers
        self.layouts: dict[str, Any] = {}
        self.room = Room()
        self.said: set[str] = set()
        self.handles: list[Any] = []  # of hooks on layers
        self.beside, self.next_tokens, self.images = Beside(self), NextTokens(self), Images(self)
        self.plain = Session(Call(model, self.engine.family, {}), prompt_len=0, plain=True)

    groups: list[Group]
    current: Step | None

    def adopt(self, engine: ServedEngine) -> ServedEngine:
        """`engine`, acting here."""
        engine.served = self
        return engine

    def install(self) -> None:
        """Wrap the runner's steps and the model's logits, and hook the layers that methods look into."""
        runner, execute, logits = self.runner, self.runner.execute_model, self.runner.model.compute_logits

        @functools.wraps(execute)
        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            with self.step_of(scheduler_output):
                return execute(scheduler_output, *args, **kwargs)

        @functools.wraps(logits)
        def compute_logits(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            made = logits(hidden_states, *args, **kwargs)
            step, self.current = self.current, None  # prompt log-probabilities are asked for later in the step
            if step is not None:
                step.settle()
            return made if step is None or made is None else self.next_tokens.edited(step, made)

        reset = runner.reset_encoder_cache

        @functools.wraps(reset)
        def reset_encoder_cache() -> Any:
            self.beside.forget()
            return reset()

        self.plain_logits = logits
        runner.reset_encoder_cache = reset_encoder_cache
        runner.execute_model, runner.model.compute_logits = execute_model, compute_logits
        layers.install(self)
        self.images.install()

    def use(self, settings: Settings) -> None:
        """Serve another stack from now on; for a worker where nothing runs, started for all that the stack needs."""
        engine = ServedEngine.plan(self.model, settings)
        refusals.check_engine(engine)
        config = self.runner.vllm_config
        refusals.check_config(config, engine)
        refusals.check_rows(self.runner, engine)
        if engine.changes_prompt and config.cache_config.enable_prefix_caching:
            raise VlmFixError("this stack needs every prompt computed: start the server with it.")
        if engine.needs["prompts in one piece"] and config.scheduler_config.enable_chunked_prefill:
            raise VlmFixError("this stack needs prompts in one piece: start the server with it.")
        if [e.pruner and e.pruner.keep for e in (engine, self.engine)].count(
            self.engine.pruner and self.engine.pruner.keep
        ) < 2:
            raise VlmFixError("how many tokens an image has is said when the server starts.")
        self.settings, self.engine = settings, self.adopt(engine)
        self.variants, self.requests, self.batches = {}, {}, {}
        layers.install(self)
        self.images.install()

    def check_caches(self) -> None:
        """Find each layer's cache layout, once the caches are there. Raises VlmFixError for one that is unknown."""
        known: dict[tuple[Any, ...], Any] = {}
        for name in self.numbers:
            layer = layers.attention_layers(self.runner)[name]
            kind = type(layer.impl), tuple(layer.kv_cache.shape[1:]), layer.kv_cache.dtype, getattr(layer, "isa", None)
            if kind not in known:
                known[kind] = layout_of(layer)
            self.layouts[name] = known[kind]

    # ---- requests ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def step_of(self, scheduler_output: Any) -> Iterator[None]:
        """While vLLM runs one step."""
        for name in scheduler_output.finished_req_ids:
            one = self.requests.pop(name, None)
            if one is not None and one.seen > one.session.prompt_len:
                self._report(one)
        self.running, self.groups, self.current = True, [], None
        try:
            yield
            if self.current is not None:
                self.current.settle()
        finally:
            self.running, self.groups, self.current = False, [], None

    def _report(self, one: Request) -> None:
        """Say of each method that changed nothing in a finished request, once."""
        engine = one.engine
        for batch in (b for b in self.batches.values() if any(s is one.session for s in b.sessions)):
            batch.settle(engine.edits)
        for wing in filter(None, (engine.attention, engine.hidden)):
            for method, why in wing.unused(one.session):
                if method not in one.session.moved:
                    self.say(f"{method.name} changed nothing in a request: {why}")

    def say(self, sentence: str) -> None:
        """Into vLLM's log, once."""
        if sentence not in self.said:
            self.said.add(sentence)
            log.warning(sentence)

    def engine_of(self, params: Any) -> ServedEngine:
        """The engine for what a request asks: the server's, or one with other strengths."""
        asked = (getattr(params, "extra_args", None) or {}).get(options.KEY)
        if asked is None:
            return self.engine
        variant = options.variant(asked, self.engine)
        if len(self.variants) >= MOST:
            used = {id(one.engine) for one in self.requests.values()}
            self.variants = {k: e for k, e in self.variants.items() if id(e) in used}
        if variant.key not in self.variants:
            made = ServedEngine(self.model, variant.methods) if variant.methods != self.engine.methods else self.engine
            self.variants[variant.key] = self.adopt(made)
        return self.variants[variant.key]

    def request(self, name: str, start: int) -> Request:
        """The request `name`, whose next chunk begins in column `start`."""
        known = self.requests.get(name)
        if known is not None and start >= known.seen:
            return known
        state = self.runner.requests[name]
        engine = self.engine_of(state.sampling_params)
        ids = state.prompt_token_ids
        if ids is None or state.prompt_is_token_ids is not None:
            raise VlmFixError("prompts of embeddings hide where the images are: send tokens or text.")
        types = torch.full((1, len(ids)), TEXT, dtype=torch.uint8)
        for feature in state.mm_features:
            place = feature.mm_position
            here = types[0, place.offset : place.offset + place.length]
            here[slice(None) if place.is_embed is None else place.is_embed.to(here.device)] = VISUAL
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        call = Call(self.model, engine.family, inputs)
        made = Request(engine, session_of(call, types), known.branches if known else {})
        made.unprepared = bool(engine.input_edits) and made.session.last_visual[0] >= 0
        self.requests[name] = made
        return made

    def step(self, common: Any) -> Step:
        """The groups of this step; made when the first of its attention metadata are built."""
        if self.current is None:
            self.current = Step(self, common.query_start_loc_cpu.tolist())
            self.groups = self.current.groups
        return self.current

    def batch(self, engine: ServedEngine, names: Sequence[str]) -> BatchSession:
        """The session of the decode rows of these requests; it is kept while they stay together."""
        sessions = [self.requests[name].session for name in names]
        made = self.batches.get(engine)
        if made is None or [id(s) for s in made.sessions] != [id(s) for s in sessions]:
            if made is not None:
                made.settle(engine.edits)
            made = self.batches[engine] = BatchSession(sessions)
        return made

    def number(self, layer: Any) -> int:
        """The number of an attention layer of the language model."""
        return self.numbers[layer.layer_name]

    def looks(self, layer: Any, impl: Any) -> Looks:
        """How the rows of an attention layer look at its columns."""
        return Looks(impl.scale, getattr(impl, "logits_soft_cap", None) or None, layers.window(layer))


class Step:
    """One step of vLLM: which of its tokens belong to which requests."""

    def __init__(self, served: Served, bounds: list[int]):
        self.served, self.groups = served, []
        self.samples: list[tuple[int, str, Request]] = []  # rows that predict a new token
        self.late: list[tuple[str, Request]] = []  # see `_prepare`
        self.joint: list[LastRows | WholePrompts] = []  # prompts that are one batch in this step
        self.last = [end - 1 for end in bounds[1:]]  # by row, the place of its last token
        batch, done = served.runner.input_batch, served.runner.input_batch.num_computed_tokens_cpu
        together: dict[ServedEngine, list[tuple[int, str, int]]] = {}
        chunks: list[tuple[int, str, Request, int, int]] = []
        self.tokens = bounds[-1]
        for row, name in enumerate(batch.req_ids):
            start, length = int(done[row]), bounds[row + 1] - bounds[row]
            one = served.request(name, start)
            one.seen = end = start + length
            session, engine = one.session, one.engine
            if not engine.active:
                continue
            if engine.needs_image and session.last_visual[0] < 0:
                served.say(f"prompts without an image are answered without {', '.join(m.name for m in engine.active)}.")
                continue
            if session.last_visual[0] < 0 and (idle := [m.name for m in engine.active if m.needs_image]):
                served.say(f"prompts without an image are answered without {', '.join(idle)}, which need one.")
            if start < session.prompt_len and engine.needs_whole and (start > 0 or end < session.prompt_len):
                one.in_pieces = True  # vLLM had no room for all of its images
            if one.in_pieces:
                served.say("a prompt came in pieces, and is answered without the methods, which need it whole.")
                continue
            if end >= session.prompt_len:
                self.samples.append((row, name, one))
            apart = engine.one_by_one or (served.window or end) < end  # a window ends elsewhere in each request
            if length == 1 and start >= session.prompt_len and not apart:
                together.setdefault(engine, []).append((row, name, end))
            else:
                chunks.append((row, name, one, start, end))
        for _, _, one, _, _ in chunks:
            if one.session.fresh:
                self._begin(one)
        served.beside.read_asked()
        self._group(chunks, bounds)
        served.batches = {k: v for k, v in served.batches.items() if k in together}
        for engine, rows in together.items():
            joint = served.batch(engine, [name for _, name, _ in rows])
            joint.go_to([end for *_, end in rows])
            places = [bounds[row] for row, *_ in rows]
            self.groups.append(Group(engine, joint, places, [row for row, *_ in rows], joint.start + 1))
        self.covered = sum(len(group.tokens) for group in self.groups)

    def _group(self, chunks: Sequence[tuple[int, str, Request, int, int]], bounds: list[int]) -> None:
        """The groups of prompts' chunks. Where methods act in last rows alone, those of many prompts are one batch, and so
        are whole prompts of the same length; any other chunk is by itself."""
        many: dict[tuple[ServedEngine, bool, bool, int], list[tuple[int, RequestSession]]] = {}
        for row, name, one, start, end in chunks:
            engine, session = one.engine, one.session
            session.go_to(start, end - start)
            span = (bounds[row], end - start) if start == 0 else None
            late = one.unprepared and end >= session.prompt_len
            if late:
                self.late.append((name, one))
            elif engine.only_last_rows and end < session.prompt_len:
                continue  # nothing is edited
            elif (
                end == session.prompt_len
                and not engine.one_by_one
                and (self.served.window or end) >= end
                and (engine.only_last_rows or span)
            ):
                length = session.prompt_len if engine.of_one_length else 0
                many.setdefault((engine, engine.only_last_rows, span is not None, length), []).append((row, session))
                continue
            places = list(range(bounds[row], bounds[row + 1]))
            self.groups.append(Group(engine, session, places, [row], end, [span] if span else None))
        for (engine, last, whole, _), members in many.items():
            rows, sessions = [row for row, _ in members], [session for _, session in members]
            joint = LastRows(sessions) if last else WholePrompts(sessions)
            self.joint.append(joint)
            places = [
                place for row in rows for place in range(bounds[row + 1] - 1 if last else bounds[row], bounds[row + 1])
            ]
            spans = [(bounds[row], session.prompt_len) for row, session in members] if whole else None
            self.groups.append(Group(engine, joint, places, rows, joint.start + joint.length, spans))

    def settle(self) -> None:
        """After the last layer: what methods remember of prompts that were one batch goes to each of them."""
        for joint in self.joint:
            joint.share()
        self.joint = []

    def _begin(self, one: Request) -> None:
        """Before the first chunk of a prompt: what methods prepare."""
        if one.session.last_visual[0] >= 0:
            one.session.go_to(0, one.session.prompt_len)
            with one.engine.acting(one.session):
                for wing in one.engine.wings:
                    wing.on_prompt(one.session)

    def _prepare(self) -> None:
        """Before the first layer of the chunk with a prompt's last row: its images have been encoded by now."""
        for name, one in self.late:
            length, start = one.session.length, one.session.start
            one.session.call.views = self.served.images.of(name)
            one.session.go_to(0, one.session.prompt_len)
            with one.engine.acting(one.session):
                for method in one.engine.input_edits:
                    method.prepare(one.session, {})
            one.session.go_to(start, length)
            one.unprepared = False
        self.late = []

    def replaces(self, layer: Any, impl: Any, query: torch.Tensor) -> bool:
        """True if `edit` will write every row of a layer, so that nothing else has to compute them."""
        if self.covered < self.tokens:
            return False
        self._prepare()
        served, number = self.served, self.served.number(layer)
        q, looks = query.view(len(query), -1, impl.head_size), served.looks(layer, impl)
        return all(group.replaces(number, q, looks) for group in self.groups)

    def edit(
        self,
        layer: Any,
        impl: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        table: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Write the edited rows over what a layer's attention made. query, key, value, output: those of the step's tokens."""
        self._prepare()
        served, number, looks = self.served, self.served.number(layer), self.served.looks(layer, impl)
        out = output.view(len(output), -1, impl.head_size)

        def gather(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
            if group.spans is not None:
                keys, values = (group.given(x.view(len(x), -1, impl.head_size)) for x in (key, value))
            else:
                chosen, own = group.pages(table, cache.shape[2], looks.window)
                keys, values = served.layouts[layer.layer_name](cache, chosen, impl.head_size, served.room)
                keys, values = keys[:, :, own], values[:, :, own]
            return group.cleared(keys, values, looks.window)

        for group in self.groups:
            if group.engine.attention.stacks[number]:
                group.edit(number, query.view(len(query), -1, impl.head_size), out, gather, looks)


_SERVED = weakref.WeakValueDictionary()


def of(vllm_config: Any) -> Served | None:
    """What serves the model of this configuration in this process."""
    return _SERVED.get(id(vllm_config.model_config))


def start(runner: Any, settings: Settings, model: Any) -> Served:
    """Serve methods on a runner whose model was loaded."""
    made = Served(runner, settings, model)
    made.install()
    runner.vlm_fix = made
    _SERVED[id(runner.vllm_config.model_config)] = made
    return made
