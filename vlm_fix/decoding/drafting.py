"""Speculative decoding in which the model drafts for itself, over a thinned-out copy of its cache.

transformers' assisted generation runs the loop: it asks for candidates, verifies them in one forward of the model as it is,
and keeps what the model itself would have said. Here is only where its candidates come from.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from transformers import DynamicCache

from vlm_fix.call import Call
from vlm_fix.errors import VlmFixError
from vlm_fix.families import attention_modules, prompt_positions
from vlm_fix.families.compat import cache_of, keeps_columns
from vlm_fix.method import Method
from vlm_fix.options import GenerateOptions
from vlm_fix.processors import Ordered
from vlm_fix.projections import Heard
from vlm_fix.pruning.after import check_model
from vlm_fix.pruning.cache import ShortLayer
from vlm_fix.pruning.kinds import CachePruner, LayerPruner, TokenPruner
from vlm_fix.pruning.kv import shorten
from vlm_fix.pruning.rows import Seen
from vlm_fix.session import VISUAL, Session, View
from vlm_fix.wing import Host, Wing, names_of

from .kinds import Searcher
from .search import Sequences

BRANCH = "main draft"  # what the main branch is drafted with
CANDIDATES = "_get_candidate_generator"  # of transformers' assisted generation


@dataclass
class Drafted:
    """What drafting did in one call of `generate`."""

    rounds: int = 0  # forwards of the whole model that verified candidates
    drafted: int = 0  # candidates
    accepted: int = 0  # of them
    columns: float = 1.0  # share of the prompt's columns that the draft's cache keeps, mean over layers

    @property
    def tokens_per_round(self) -> float:
        """Tokens that one verification gives: the candidates accepted, and one of the model's own."""
        return 1 + self.accepted / self.rounds if self.rounds else 1.0


@dataclass(frozen=True)
class Drafter(Method, ABC):
    """Drafts with a part of the image columns; the model as it is verifies, so that no answer changes."""

    kind: ClassVar[str] = "procedure"

    @property
    @abstractmethod
    def length(self) -> int:
        """Candidates of one round."""

    @abstractmethod
    def keeps(self, seen: Seen, session: Session, visual: torch.Tensor) -> torch.Tensor:
        """After a layer's attention over a prompt: [1, Hkv or 1, n] True for columns of `visual` [1, n] that the draft keeps."""


@dataclass
class Kept:
    """A part of the main session: [1, Hkv or 1, n] by layer, the columns that the draft keeps."""

    by_layer: dict[int, torch.Tensor] = field(default_factory=dict)


class Candidates:
    """The candidate generator that transformers' assisted generation asks."""

    requires_model_outputs = False

    def __init__(self, wing: DraftWing, call: Call, config: Any, processors: Any):
        self.wing, self.call, self.config = wing, call, config
        self.processors = processors.theirs if isinstance(processors, Ordered) else processors
        self.draft: Sequences | None = None
        self.known = call.inputs["input_ids"][:, :0]  # [1, t] the tokens whose keys the draft has
        self.pending = 0

    def get_candidates(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[1, n] all tokens so far -> the same with candidates after them, and their draft scores [1, k, V]."""
        start = self.call.inputs["input_ids"].shape[1]
        length = min(self.wing.method.length, int(self.config.max_length) - input_ids.shape[1] - 1)
        self.pending = 0
        if input_ids.shape[1] == start or length < 1:  # the prompt has to be read first
            return input_ids, None
        if self.draft is None:
            self.draft = self.wing.begin(self.call)
        generated, known = input_ids[:, start:], self.known
        n = min(known.shape[1], generated.shape[1] - 1)
        same = int((known[:, :n] == generated[:, :n])[0].long().cumprod(dim=0).sum())
        self.draft.crop(known.shape[1] - same)
        ids, scores = input_ids, list[torch.Tensor]()
        new = generated[:, same:]
        for _step in range(length):
            logits = self.draft.forward(new)
            scores.append(self.processors(ids, logits))  # type: ignore[arg-type]
            p = scores[-1]
            new = p.softmax(dim=-1).multinomial(1) if self.config.do_sample else p.argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, new], dim=1)
            if bool(torch.isin(new, self.wing.ends(self.config).to(new.device))):
                break
        self.known = ids[:, start:-1]  # the last candidate's keys are not computed
        self.pending = len(scores)
        return ids, torch.stack(scores, dim=1)

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: Any) -> None:
        """Called after each verification."""
        report = self.wing.report
        if self.pending and report is not None:
            report.rounds += 1
            report.drafted += self.pending
            report.accepted += min(int(num_matches), self.pending)


class DraftWing(Wing):
    """Turns a call of `generate` into assisted generation, where that is possible, and drafts for it."""

    order = 38  # refined prompts are drafted for; a contrast sees that drafts are verified
    runs = (Drafter,)

    def __init__(self, host: Host, method: Drafter):
        super().__init__(host)
        self.method = method
        self.call: Call | None = None  # the running one that is drafted for
        self.report: Drafted | None = None  # of the last call

    @classmethod
    def claim(cls, host: Host) -> Self | None:
        found = [m for m in host.active if isinstance(m, Drafter)]
        return cls(host, found[0]) if found else None

    def check(self) -> None:
        self.host.need_image_columns([self.method.name])
        others = names_of(self.host.active, TokenPruner, LayerPruner, CachePruner, Searcher)
        if others:
            raise VlmFixError(
                f"{self.method.name} drafts with fewer columns of a whole cache, in the model's own decoding, and {others[0]} "
                "changes one of them: use one of the two."
            )

    def install(self) -> Iterable[Any]:
        check_model(self.host, self.method, prompt=False)
        own = vars(self.host.model).get(CANDIDATES)  # the caller's, put on the model
        yield _Own(self.host.model, CANDIDATES, functools.partial(self._candidates, own))
        for i, layer in enumerate(self.host.language.layers):
            yield layer.register_forward_pre_hook(functools.partial(self._mask, i), with_kwargs=True)
        for i, attn in attention_modules(self.host.language).items():
            heard = Heard(attn)
            yield heard
            yield attn.register_forward_hook(functools.partial(self._look, i, heard), with_kwargs=True)

    def refuse(self, options: GenerateOptions) -> None:
        if options.assisted:
            raise VlmFixError(
                f"{self.method.name} drafts itself: drop assistant_model, prompt_lookup_num_tokens or unwrap the model."
            )

    def undrafted(self, call: Call, options: GenerateOptions) -> str:
        """Why this call goes without drafts, with the same answer; "" if it does not."""
        if call.batch > 1:
            return "drafts are verified for one prompt at a time, and this is a batch"
        for name, used in {
            "beams": options.beams > 1,
            "num_return_sequences": (options.setting("num_return_sequences") or 1) > 1,
            f"a cache of kind {options.cache_kind}": options.cache_kind != "dynamic",
            "prefill_chunk_size": bool(options.setting("prefill_chunk_size")),
            "use_cache=False": options.setting("use_cache") is False,
            "custom_generate": options.kwargs.get("custom_generate") is not None,
            "a cache of an earlier turn": options.kept is not None,
        }.items():
            if used:
                return f"drafts do not go with {name}"
        return ""

    @contextlib.contextmanager
    def around_generate(self, call: Call, options: GenerateOptions) -> Iterator[None]:
        reason = self.undrafted(call, options)
        if reason:
            what = "drafted nothing in this call, which has the same answer without"
            self.host.warn_once([self.method], f"{reason}.", what)
            yield
            return
        options.kwargs["prompt_lookup_num_tokens"] = (
            self.method.length
        )  # transformers' assisted generation, see _candidates
        outer, self.call, self.report = self.call, call, Drafted()
        try:
            yield
        finally:
            self.call = outer

    def only_in_generate(self) -> Iterator[tuple[Method, str]]:
        yield self.method, "draft"

    def _candidates(self, own: Callable[..., Any] | None, **given: Any) -> Any:
        model = self.host.model
        if self.call is None or self.host.call is not self.call:
            return own(**given) if own else getattr(type(model), CANDIDATES)(model, **given)
        return Candidates(self, self.call, given["generation_config"], given["logits_processor"])

    def ends(self, config: Any) -> torch.Tensor:
        """The ids that end an answer."""
        ends = config.eos_token_id
        return torch.as_tensor([] if ends is None else ends, dtype=torch.long).flatten()

    def begin(self, call: Call) -> Sequences:
        """The draft's copy of the prompt: the main session's states as they are now, over fewer columns."""
        host, main = self.host, self.host.main
        whole = main.cache() if main and main.cache else None
        if whole is None or type(whole) is not DynamicCache or not keeps_columns(whole):
            raise VlmFixError(
                f"{self.method.name} needs a dynamic cache of all columns; unwrap the model for this call."
            )
        assert main is not None
        session, cache = main.copied(), DynamicCache(config=host.model.config.get_text_config())
        session.branch, kept = BRANCH, main.part(Kept).by_layer
        layers = [ShortLayer.of(layer, 0) for layer in whole.layers]
        cache.layers = [*layers]
        host.sessions[cache] = session
        width, shares = session.prompt_len, list[float]()
        for i, layer in enumerate(layers):
            assert layer.keys is not None and layer.values is not None
            layer.keys, layer.values = (x[:, :, :width] for x in (layer.keys, layer.values))
            if i in kept and not kept[i].all():
                shorten(session, i, layer, kept[i])
                session.at(i).branch = BRANCH
            shares.append(layer.keys.shape[2] / width)
        assert self.report is not None
        self.report.columns = sum(shares) / len(shares)
        _, position = prompt_positions(host.model, host.family, call.inputs)
        return Sequences(host, cache, call.inputs["attention_mask"], position)

    def _mask(self, i: int, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        session = self.host.editing
        if session is None or session.branch != BRANCH or not isinstance(session.at(i), View):
            return None
        x, view = args[0] if args else kwargs["hidden_states"], session.at(i)
        assert isinstance(view, View)
        return args, {**kwargs, "attention_mask": view.attention_mask(x.device)}

    def _look(self, i: int, heard: Heard, attn: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        session, cache, queries = self.host.editing, cache_of(kwargs), heard.taken()
        if self.call is None or session is None or session is not self.host.main or session.start or cache is None:
            return
        if max(session.last_visual) < 0:
            return
        x = args[0] if args else kwargs["hidden_states"]
        keys = cache.layers[i].keys
        seen = Seen(attn, x, kwargs["position_embeddings"], keys, kwargs.get("position_ids"), queries)
        visual = (session.types == VISUAL).to(x.device)
        with torch.no_grad():
            session.part(Kept).by_layer[i] = self.method.keeps(seen, session, visual) | ~visual[:, None]


@dataclass
class _Own:
    """A function put on a model under a name, to be taken off like a hook."""

    model: Any
    name: str
    function: Callable[..., Any]

    def __post_init__(self) -> None:
        self.before = vars(self.model).get(self.name)
        setattr(self.model, self.name, self.function)

    def remove(self) -> None:
        vars(self.model).pop(self.name, None)
        if self.before is not None:
            setattr(self.model, self.name, self.before)
