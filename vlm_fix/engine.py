"""wrap, unwrap, wrapped: installs methods on a model through public extension points and takes them off again."""

from __future__ import annotations

import functools
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import LogitsProcessorList

from vlm_fix import attention
from vlm_fix import compiled as graph
from vlm_fix.arch import Arch
from vlm_fix.attention.edits import AttentionEdit
from vlm_fix.decoding.kinds import Contrast, LogitEdit, Procedure
from vlm_fix.decoding.prompt import Prompt
from vlm_fix.errors import VlmFixError
from vlm_fix.families import arch_of, get_part, image_token_ids
from vlm_fix.families.compat import CACHE, cache_of, versions
from vlm_fix.hidden.edit import HiddenEdit
from vlm_fix.method import Method
from vlm_fix.pruning.after import LayerPruner
from vlm_fix.pruning.kinds import TokenPruner
from vlm_fix.pruning.kv import CachePruner
from vlm_fix.session import PAD, TEXT, VISUAL, Call, Session

if TYPE_CHECKING:
    from vlm_fix.decoding.term import Term

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LayerHandle:
    """What the attention function finds on an attention module."""

    engine: Engine
    layer: int


class Engine:
    """Everything installed on one model. `session` is the session of the forward that is running."""

    def __init__(self, model: Any, methods: list[Method]):
        self.model, self.methods = model, methods
        self.arch: Arch = arch_of(model)
        self.family = self.arch.family
        self.base = get_part(model, self.family.base)
        self.language = get_part(model, self.family.language)
        resolved = [m.resolve(self.arch) for m in methods]
        self.active = [m for m in resolved if not m.neutral]
        check_combination(self.active)
        what = ("logits", "log_weights", "weights", "heads", "see", "hides")
        stacks = self._by_layer(lambda e: any(map(e.edits, what)))
        self.edits = [next(s for s in stacks if s == stack) for stack in stacks]  # equal stacks are one list
        self.watchers = self._by_layer(lambda e: e.edits("watch"))
        self.hidden = [m for m in self.active if isinstance(m, HiddenEdit)]
        self.contrast = next((m for m in self.active if isinstance(m, Contrast) and m.contrasts), None)
        self.pruner = next((m for m in self.active if isinstance(m, TokenPruner)), None)
        procedures = [m for m in self.active if isinstance(m, Procedure)]
        self.procedure = next((m for m in procedures if m.does("search")), None)
        self.refiners = [m for m in procedures if m.does("refine")]
        self.dropper = next((m for m in self.active if isinstance(m, LayerPruner)), None)
        self.cacher = next((m for m in self.active if isinstance(m, CachePruner)), None)
        self.shortens = list(dict.fromkeys(m for m in (self.pruner, self.dropper, self.cacher) if m))
        self.preparing = [m for m in self.active if m.prepares]
        others = self.shortens or self.contrast or self.procedure
        self.one_graph = not others and not any(isinstance(m, LogitEdit) and m.exits for m in self.active)
        self.looks: dict[tuple[str, int], Callable[[torch.Tensor], torch.Tensor | None]] = {}  # see graph.through
        self.installed = False
        self.session: Session | None = None
        self.call: Call | None = None
        self.touched: set[Method] = set()
        self.warned: set[Method] = set()
        self.main: Session | None = None  # the main session of the last call, until the call ends
        self.sessions: weakref.WeakKeyDictionary[Any, Session] = weakref.WeakKeyDictionary()
        self.tokens = torch.tensor(image_token_ids(model, self.family))
        self.contrasting: Any = None  # decoding.contrast.PrefixContrast of the running call
        self.joint: Any = None  # decoding.joint.Joint, while one forward runs all branches
        self.term: Term | None = None  # decoding.term.Term of the last call
        self.probe: Any = None  # observation.Probe of an observing pass
        self.key = graph.number(self)
        self.lock = threading.RLock()
        self.handles: list[Any] = []

    def install(self, idle: bool = False) -> None:
        """Attention function, hooks and generate shim; undone by `remove` if anything goes wrong.

        Without an active method nothing is installed, unless `idle` asks for it.
        """
        config = self.model.config.get_text_config()
        self.before = config._attn_implementation
        capped = getattr(config, "attn_logit_softcapping", None)  # no kernel of SDPA does that: such models run eager
        if self.before != (base := "eager" if capped else "sdpa"):
            why = (
                "builds on its eager attention" if capped else "builds on SDPA (which uses flash kernels where it can)"
            )
            raise VlmFixError(
                f"the language model runs {self.before!r} attention; vlm-fix {why}: call "
                f'model.set_attn_implementation("{base}") first.'
            )
        if not self.active and not idle:
            return
        self.installed = True
        try:
            attention.register()
            self.model.set_attn_implementation({"text_config": attention.NAME})
            self.handles.append(self.base.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.handles.append(self.base.register_forward_hook(self._leave, with_kwargs=True))
            if self.shortens:
                from vlm_fix.pruning import after, before, kv

                self.handles += before.install(self)
                self.handles += after.install(self) if self.dropper else []
                self.handles += kv.install(self) if self.cacher else []
            for i, layer in enumerate(self.language.layers):
                layer.self_attn._vlm_fix = LayerHandle(self, i)
                if self.watchers[i]:
                    self.looks["watch", i] = functools.partial(self._look, i)
                    hook = functools.partial(self._watch, i)
                    self.handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            if self.hidden:
                from vlm_fix.hidden import hooks as hidden

                self.handles += hidden.install(self)
            if self.contrast:
                from vlm_fix.decoding import contrast

                self.handles += contrast.install(self)
            looks = [m.encoder_layers(self.arch) for m in self.active if m not in self.shortens]
            if any(layers is not None for layers in looks):
                from vlm_fix.pruning.encoder import capture

                wanted = tuple(sorted({i for layers in looks for i in layers or ()}))
                self.handles += capture(self, get_part(self.model, self.family.vision), wanted, into="views")
            if self.preparing:
                self.looks["prepare", 0] = self._moved
                # after the pruner's hook: methods see what it left
                self.handles.append(self.language.register_forward_pre_hook(self._prepare, with_kwargs=True))
            self.model.generate = types.MethodType(functools.partial(_generate, self), self.model)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore the model exactly."""
        for handle in self.handles:
            handle.remove()
        for layer in self.language.layers:
            layer.self_attn.__dict__.pop("_vlm_fix", None)
        if self.installed:
            self.model.set_attn_implementation({"text_config": self.before})
        self.model.__dict__.pop("generate", None)

    def _by_layer(self, wanted: Callable[[AttentionEdit], bool]) -> list[list[AttentionEdit]]:
        """The active attention edits of each layer that are `wanted`."""
        edits = [e for e in self.active if isinstance(e, AttentionEdit) and wanted(e)]
        return [[e for e in edits if i in (e.layers or ())] for i in range(self.arch.depth)]

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def _enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Before the multimodal model's forward: find or open the session and classify the new columns."""
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None and graph.tracing(self, ids.shape[1]):
            return graph.enter(self, args, kwargs)
        return self._entered(module, args, kwargs)

    @graph.uncompiled
    def _entered(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self.session is not None and self.session.plain:  # a pass of `observe`
            return None
        if kwargs.get("output_attentions") or module.config.output_attentions:
            raise VlmFixError(
                "attention weights are never formed here: drop output_attentions=True, or unwrap the model first."
            )
        if "cu_seq_lens_q" in kwargs:
            raise VlmFixError(
                "packed sequences (cu_seq_lens) are not supported; pass a padded batch with its attention_mask."
            )
        now = module.config.get_text_config()._attn_implementation
        if now != attention.NAME:
            raise VlmFixError(
                f"attention was set to {now!r} after wrap, past every method: unwrap the model, then wrap it."
            )
        cache = cache_of(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        self.session = self.joint = None  # if anything below fails, the next forward must not see an old one
        session = self.sessions.get(cache) if cache is not None else None
        if cache is None:
            self._check_cacheless(args, kwargs)
        if session is None and past:
            raise VlmFixError("the cache was filled while the model was not wrapped; start from the whole prompt.")
        if session is None:
            session = Session(self.call or self._bare_call(args, kwargs))
            if cache is not None:
                self.sessions[cache] = session
        ids, mask = args[0] if args else kwargs.get("input_ids"), kwargs.get("attention_mask")
        self._advance(session, past, self._classify(ids, kwargs.get("inputs_embeds")), mask)
        if self.contrasting and session is self.main:
            return self.contrasting.join(session, args, kwargs)
        return None

    def _check_cacheless(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Refuse a decode step whose cache is not among its arguments: every method would silently do nothing."""
        ids, mask = args[0] if args else kwargs.get("input_ids"), kwargs.get("attention_mask")
        again = self.call is not None and self.main is not None and self.main.call is self.call
        if again and kwargs.get("use_cache") is not False:
            what = "a later forward of generate came without a cache"
        elif ids is not None and isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] > ids.shape[1]:
            what = "a decode step came without a cache"
        else:
            return
        raise VlmFixError(
            f"{what}, so no method can act in it: {versions()} does not hand caches on in a way known here, or the model "
            f"was called without {CACHE}=. Run `vlm-fix doctor`, or unwrap the model."
        )

    def resume(self, ids: torch.Tensor, mask: torch.Tensor | None, past: int) -> None:
        """`_enter` when a graph runs: `generate` has one session, and it is the main one."""
        self.session = None
        assert self.call is not None
        session = self.main
        if not past:
            session = Session(self.call)
        elif session is None and self.call.cache is not None:  # the next turn on a kept cache
            session = self.sessions.get(self.call.cache)
        if session is None:
            raise VlmFixError("the cache was filled while the model was not wrapped; start from the whole prompt.")
        self._advance(session, past, self._classify(ids, None), mask)

    def _advance(self, session: Session, past: int, kinds: torch.Tensor, mask: Any) -> None:
        """The session of this forward with its new columns, of `kinds` [B, q]; a new prompt begins."""
        fresh = session.types is None
        if session.branch == "main" and self.call is not None and (fresh or session.call is not self.call):
            fresh, session.call = True, self.call  # a new prompt, or the next turn on a kept cache
            session.prompt_len = self.call.inputs["input_ids"].shape[1]
        elif session.branch == "main" and self.call is None and (fresh or kinds.shape[1] > 1):
            session.prompt_len = past + kinds.shape[1]
        if session.prompt_len is not None and past >= session.prompt_len:
            kinds = torch.full_like(kinds, TEXT)  # an image token that the model generates shows no image
        else:
            if not isinstance(mask, torch.Tensor) or mask.dim() != 2:  # a static cache's masks come ready-made
                mask = session.call.inputs.get("attention_mask")
            if mask is not None and mask.dim() == 2 and mask.shape[1] >= past + kinds.shape[1]:
                mask = mask.repeat_interleave(len(kinds) // len(mask), dim=0)
                kinds = torch.where(mask[:, past : past + kinds.shape[1]].to(kinds.device) == 0, PAD, kinds)
            last = session.prompt_len - 1 - past if session.prompt_len is not None else kinds.shape[1]
            if last < kinds.shape[1] and bool((kinds[:, last] == PAD).any()):
                raise VlmFixError(
                    "a prompt is padded on the right, so that its last token is not where methods act; pad on the left: "
                    'processor.tokenizer.padding_side = "left".'
                )
        session.advance(past, kinds)
        if session.branch == "main" and self.call is not None:
            self.main = session
        if fresh:
            self._begin(session)
        self.session = session

    def _bare_call(self, args: Any, kwargs: dict[str, Any]) -> Call:
        """The call of a forward outside `generate`."""
        ids = args[0] if args else kwargs.get("input_ids")
        inputs = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor)} | {"input_ids": ids}
        if ids is not None and inputs.get("attention_mask") is None:
            inputs["attention_mask"] = torch.ones_like(ids)
        return Call(self.model, self.family, inputs)

    def _begin(self, session: Session) -> None:
        """First forward of a prompt: let methods prepare (text-only passes and the like)."""
        if max(session.last_visual) < 0:
            needy = [m.name for m in self.active if m.needs_image]
            if needy and self.call is None:
                warnings.warn(f"{', '.join(needy)} did nothing: the input has no image tokens.", stacklevel=2)
            return
        for edit in self.active:
            if isinstance(edit, AttentionEdit) and edit.edits("begin") and edit.acts_in(session.branch):
                edit.begin(session, session.call)

    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After the forward: remember a cache that the model made itself, for a caller's own decoding loop."""
        if not graph.tracing(self, output[0].shape[1]):
            self._left(output)

    @graph.uncompiled
    def _left(self, output: Any) -> None:
        if self.session is not None and self.session.plain:
            return
        cache = cache_of(output)
        if cache is not None and self.session is not None and cache not in self.sessions and not self.joint:
            self.sessions[cache] = self.session
        self.session = None

    def _prepare(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        places = kwargs.get("position_ids")
        if places is not None and graph.tracing(self, places.shape[-1]):
            return args, {**kwargs, "position_ids": graph.through(self, "prepare", 0, places, places.shape[-1])}
        return self._prepared_inputs(args, kwargs)

    @graph.uncompiled
    def _prepared_inputs(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self.session is None or self.session.plain:
            return None
        if self.joint:
            return args, self.joint.prepare(kwargs)
        return args, self._prepared(self.session, kwargs)

    def _moved(self, places: torch.Tensor) -> torch.Tensor:
        """The position ids of one row: all that methods change in a graph's forward."""
        assert self.session is not None
        return self._prepared(self.session, {"position_ids": places})["position_ids"]

    def _prepared(self, session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
        for method in self.preparing:
            if not isinstance(method, AttentionEdit) or method.acts_in(session.branch):
                kwargs = method.prepare(session, kwargs)
        return kwargs

    def _watch(
        self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        x = args[0] if args else kwargs["hidden_states"]
        new = graph.through(self, "watch", layer, x, x.shape[1])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": new})

    def _look(self, layer: int, x: torch.Tensor) -> None:
        """Show a layer's input [B, q, C] to the edits that ask for it."""
        if self.session is None or self.session.plain:
            return
        sessions = self.joint.sessions if self.joint else [self.session]
        for session, rows in zip(sessions, x.chunk(len(sessions)), strict=True):
            for edit in (e for e in self.watchers[layer] if e.acts_in(session.branch)):
                edit.watch(rows, layer, session.at(layer))

    def _classify(self, ids: torch.Tensor | None, embeds: torch.Tensor | None) -> torch.Tensor:
        """[B, q] TEXT or VISUAL, from the token ids or, without them, from the embeddings."""
        if ids is not None:
            return torch.isin(ids, self.tokens.to(ids.device)).to(torch.uint8) * (VISUAL - TEXT) + TEXT
        assert embeds is not None
        vectors = self.model.get_input_embeddings()(self.tokens.to(embeds.device))
        return (embeds[:, :, None] == vectors).all(-1).any(-1).to(torch.uint8) * (VISUAL - TEXT) + TEXT

    def report_idle(self) -> None:
        """After a call: warn, once per method, if an edit changed nothing in it."""
        edits: list[AttentionEdit | HiddenEdit] = [*(e for layer in self.edits for e in layer), *self.hidden]
        for edit in dict.fromkeys(edits):
            if self.main and edit not in self.warned and not (edit in self.touched and edit.acted(self.main)):
                self.warned.add(edit)
                warnings.warn(f"{edit.name} changed nothing in this call: {edit.idle_reason}", stacklevel=4)
        for pruner in self.shortens:
            if self.main and getattr(pruner, "keep", 1) != 1 and pruner not in self.warned and not self._drops(pruner):
                self.warned.add(pruner)
                warnings.warn(
                    f"{pruner.name} changed nothing in this call: its keep covers every image token; lower it.",
                    stacklevel=4,
                )

    def _drops(self, pruner: Method) -> bool:
        """False if the finished call still has all the image tokens that `pruner` may drop (True without an image)."""
        main = self.main
        assert main is not None and main.types is not None
        images = int((main.types == VISUAL).sum())
        if not images:
            return True
        if pruner is self.pruner and (main.kept is not None or self.pruner.edits("shrink")):
            return True
        if pruner not in (self.dropper, self.cacher):
            return False
        return any(int((view.types == VISUAL).sum()) < images for view in main.views.values() if view.types is not None)

    # ---- passes of the methods' own ----------------------------------------------------------------------------------

    @torch.no_grad()
    def refine(self, call: Call) -> dict[str, Any]:
        """Let procedures change the call's inputs; what they changed."""
        changed: dict[str, Any] = {}
        if self.refiners and "position_ids" in call.inputs:
            raise VlmFixError(f"{self.refiners[0].name} makes prompts of its own: leave position_ids out.")
        for method in self.refiners:
            changed.update(method.refine(call))
            call.inputs.update(changed)
        return changed

    @torch.no_grad()
    def observe(self, inputs: dict[str, torch.Tensor], call: Call, tap: Any) -> None:
        """One cache-free forward of `inputs` without edits; `tap(layer, o [B, H, q, D])` sees per-head outputs."""
        from vlm_fix.families import prompt_positions

        positions, _ = prompt_positions(self.model, self.family, inputs)
        session = Session(call, branch="observe", plain=True, tap=tap, prompt_len=inputs["input_ids"].shape[1])
        session.advance(0, self._classify(inputs["input_ids"], None))
        outer, self.session = self.session, session
        try:
            self.base(**inputs, position_ids=positions, use_cache=False)
        finally:
            self.session = outer


def _generate(engine: Engine, model: Any, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """`generate` of a wrapped model: opens a Call, adds the contrast branch, and closes the Call again."""
    original = type(model).generate
    ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else inputs
    if ids is None or not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise VlmFixError(
            "pass the prompt as input_ids (the processor's output); inputs_embeds alone hide where the images are."
        )
    config = kwargs.get("generation_config")

    def setting(name: str) -> Any:
        return kwargs.get(
            name, getattr(config, name, None) if config is not None else getattr(model.generation_config, name, None)
        )

    if setting("output_attentions"):
        raise VlmFixError(
            "attention weights are never formed here: drop output_attentions=True, or unwrap the model first."
        )
    if setting("cache_implementation") == "paged":
        raise VlmFixError(
            "continuous batching (cache_implementation='paged') is not supported; call generate with a padded batch."
        )
    needy = [m.name for m in engine.active if m.needs_image]
    if needy and not bool(torch.isin(ids, engine.tokens.to(ids.device)).any()):
        raise VlmFixError(
            f"{', '.join(needy)} needs an image, but no prompt contains an image token: pass images to the processor, "
            "or unwrap the model for text-only prompts."
        )
    if engine.shortens:
        wanders = engine.cacher and engine.cacher.wanders
        assisted = kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens")
        for name, used in {
            "assisted decoding": assisted,
            "a static cache": setting("cache_implementation"),
            "chunked prefill": setting("prefill_chunk_size"),
            "a cache of an earlier turn": cache_of(kwargs) is not None,
            "beams": wanders and (setting("num_beams") or 1) > 1,
            "a decoding loop of a method": wanders and engine.procedure,
        }.items():
            if used:
                raise VlmFixError(f"{engine.shortens[0].name} does not work with {name}; drop that option.")
    if engine.refiners and cache_of(kwargs) is not None:
        raise VlmFixError(
            f"{engine.refiners[0].name} changes the images before they are read: drop the kept cache and pass the "
            "whole conversation as one prompt."
        )
    if engine.procedure:
        from vlm_fix.decoding import loops

        loops.check(engine.procedure, setting)
    mask = kwargs.get("attention_mask")
    if mask is None:
        kwargs["attention_mask"] = mask = torch.ones_like(ids)
    given = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
    with engine.lock:
        given |= {"input_ids": ids, "attention_mask": mask}
        call = Call(model, engine.family, given, cache=cache_of(kwargs))
        engine.call, engine.touched, engine.term = call, set(), None
        own: list[Any] = []
        edits = [m for m in engine.active if isinstance(m, LogitEdit)]
        try:
            kwargs.update(engine.refine(call))
            prompt = Prompt(ids, call.inputs["input_ids"])
            kwargs.update(prompt.keep(kwargs, setting) if prompt.longer else {})
            if engine.contrast:
                from vlm_fix.decoding.contrast import PrefixContrast
                from vlm_fix.decoding.term import Term

                plain = setting("num_beams") in (None, 1) and kwargs.get("custom_generate") is None
                assisted = kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens")
                engine.term = None if assisted else Term(setting("eos_token_id"))  # drafts come with made-up scores
                joins = plain and not assisted
                engine.contrasting = PrefixContrast(engine, engine.contrast, call, joins, engine.term)
                own.append(engine.contrasting)
            if edits:
                from vlm_fix.decoding.logits import LogitEdits

                own.append(LogitEdits(engine, edits, call))
            if own:
                user = kwargs.pop("logits_processor", None) or []
                kwargs["logits_processor"] = LogitsProcessorList([*own, *user])
            if engine.procedure:
                kwargs["custom_generate"] = loops.run(engine, engine.procedure, call, kwargs.get("streamer"))
            if (
                setting("compile_config") is None
            ):  # CUDA graphs, which a static cache starts by itself, replay no Python
                kwargs.setdefault("disable_compile", True)
            kwargs.pop("input_ids", None)
            output = original(model, call.inputs["input_ids"], **kwargs)
            engine.report_idle()
            cache = cache_of(output)
            if cache is not None and engine.main and cache not in engine.sessions:  # a compiled prefill shows no cache
                engine.sessions[cache] = engine.main
            return prompt.restored(output)
        finally:
            engine.call = engine.session = engine.main = engine.contrasting = engine.joint = None
            for processor in own:
                processor.close()


def check_combination(methods: list[Method]) -> None:
    """Refuse stacks that have no meaning, with the reason."""
    for cls, what in ((Contrast, "contrast"), ((TokenPruner, LayerPruner), "prune tokens")):
        names = [m.name for m in methods if isinstance(m, cls) and (m.contrasts if isinstance(m, Contrast) else True)]
        if len(names) > 1:
            raise VlmFixError(f"{' and '.join(names)} both {what}; use one of them at a time.")
    cachers = [m.name for m in methods if isinstance(m, CachePruner)]
    others = [m.name for m in methods if isinstance(m, LayerPruner) or (isinstance(m, AttentionEdit) and m.marks)]
    if cachers and len(cachers + others) > 1:
        raise VlmFixError(
            f"{cachers[0]} leaves each layer other columns after the prompt, which {(cachers[1:] + others)[0]} does not "
            "follow; use one of them at a time."
        )
    alone = [m.name for m in methods if isinstance(m, AttentionEdit) and m.branch == "negative"]
    if alone and not any(isinstance(m, Contrast) and m.contrasts for m in methods):
        raise VlmFixError(f"{alone[0]}: branch=negative needs a contrast method beside it, as in vcd.")
    refiners = [m.name for m in methods if isinstance(m, Procedure) and m.does("refine")]
    droppers = [m.name for m in methods if isinstance(m, TokenPruner | LayerPruner | CachePruner)]
    if refiners and droppers:
        raise VlmFixError(
            f"{refiners[0]} looks at all image tokens, of which {droppers[0]} drops some; use one of them."
        )
    procedures = [m.name for m in methods if isinstance(m, Procedure) and m.does("search")]
    others = [m.name for m in methods if isinstance(m, LogitEdit) or (isinstance(m, Contrast) and m.contrasts)]
    if procedures and len(procedures + others) > 1:
        raise VlmFixError(
            f"{procedures[0]} runs a decoding loop of its own and takes no other decoding method beside it: drop "
            f"{', '.join(procedures[1:] + others)}."
        )
    names = [m.name for m in methods]
    for name in names:
        if names.count(name) > 1:
            raise VlmFixError(f"{name} is listed twice; give it once, with the parameters you want.")
