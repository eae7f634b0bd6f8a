"""A wing is what one kind of method needs on a model; the engine is a host that calls its wings in one order.

A kind of method is a base class and a wing beside it. Defining the wing registers it: no list has to be edited.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self, TypeVar

import torch

from vlm_fix.arch import Arch, Family
from vlm_fix.caches import Sessions
from vlm_fix.call import Call
from vlm_fix.effects import Effects
from vlm_fix.errors import VlmFixError
from vlm_fix.families.compat import keeps_columns
from vlm_fix.method import Method
from vlm_fix.options import GenerateOptions
from vlm_fix.recorder import Recorder
from vlm_fix.session import TEXT, VISUAL, Session

W = TypeVar("W", bound="Wing")
NO_IMAGE = "no prompt contains an image token, so the model answers as if it were not wrapped."
NO_IDS = "inputs_embeds alone hide where the images are; pass input_ids and pixel_values (the processor's output)."
OUTSIDE = "that is done only inside generate; call model.generate, or unwrap the model."
MASKED = "attention_mask masks every image token, so no row of it was reached."
NOT_NUMBERS = (
    "the scores of a token were NaN, or none of them was finite: edits must leave numbers, and at least one token; try less "
    "extreme settings, or if the model is in float16, load it in bfloat16 or float32."
)
UNMOVED = "it gave back what it was given, unchanged, wherever it was asked."
ATTRIBUTE = "_vlm_fix_engine"  # where a wrapped model keeps its engine


class JointForward(ABC):
    """One forward that runs the rows of several sessions, block by block."""

    sessions: list[Session]

    @abstractmethod
    def attention(
        self, function: Callable[..., Any], module: Any, query: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """[n B, H, 1, D] -> [n B, 1, H, D], each block over its own cache."""

    @abstractmethod
    def prepare(
        self, edit: Callable[[Session, dict[str, Any]], dict[str, Any]], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The language model's inputs after `edit(session, inputs)` of each block."""


class Running(threading.local):
    """What runs on a model at this moment, in this thread."""

    def __init__(self) -> None:
        self.session: Session | None = None  # of the forward that is running
        self.call: Call | None = None  # the running `generate`
        self.main: Session | None = None  # the main session of the running call
        self.joint: JointForward | None = None
        self.along: Any = None  # attention.along.Along: a prompt whose rows run in the forward of another
        self.recorder: Recorder | None = None
        self.touched: set[Method] = set()  # edits that reached a row in this call
        self.generating = False  # True inside `generate`, whoever's code is running there
        self.quiet = False  # True in forwards that the user has not asked for


def _running(name: str) -> Any:
    """A property of a host that each thread has for itself: forwards in several threads do not meet."""
    return property(lambda host: getattr(host.running, name), lambda host, value: setattr(host.running, name, value))


class Host:
    """What wings and methods see of the engine on a model."""

    model: Any
    methods: list[Method]  # as the user gave them
    active: list[Method]  # resolved for this model, without the neutral ones
    arch: Arch
    family: Family
    base: Any  # the multimodal model without its language head
    language: Any  # the decoder
    tokens: torch.Tensor  # ids of image tokens
    wings: Sequence[Wing]
    installed: bool
    key: int  # under which custom operators find the engine
    callbacks: dict[tuple[str, int], Callable[[torch.Tensor], torch.Tensor | None]]  # see compiled.run_callback
    attention_functions: dict[int, Callable[..., Any]]  # by layer, of the language model
    lock: threading.RLock
    running: Running
    sessions: Sessions
    warned: set[tuple[Method, str]]  # what the user was told already
    effects: Effects

    session = _running("session")
    call = _running("call")
    main = _running("main")
    joint = _running("joint")
    along = _running("along")
    recorder = _running("recorder")
    touched = _running("touched")
    quiet = _running("quiet")

    def need_all_heads(self, names: Sequence[str]) -> None:
        """VlmFixError for methods that work on attention, if each process has only a part of a layer's heads."""
        parts = getattr(self.model, "tp_size", None) or 1
        if names and parts > 1:
            raise VlmFixError(
                f"{', '.join(names)} works on all heads of a layer, of which tensor parallelism leaves each of {parts} "
                "processes a part: load the model without tp_plan; device_map shares out whole layers."
            )

    def need_image_columns(self, names: Sequence[str]) -> None:
        """VlmFixError for methods that work on image columns of the language model, if it has none."""
        if names and self.family.crosses:
            raise VlmFixError(
                f"{', '.join(names)} works on the columns of the language model that show the image, which a {self.family.name} "
                "model does not have: it reads images in cross-attention layers, where a row sees no text to weigh them "
                "against. Contrasts of images or prompts, and edits of logits and hidden states, work on it."
            )

    def keeps_columns(self, cache: Any) -> bool:
        """True if every layer of the cache holds the keys of all text and image columns, which can be cut and copied."""
        return not self.family.crosses and keeps_columns(cache)

    @contextlib.contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """Let `recorder` see the forwards of this thread, for as long as this lasts."""
        asking = [m.name for m in self.active] if self.running.generating else []  # else it is `inspect` or the like
        self.need_all_heads(asking or ["what reads attention weights"])
        before, self.recorder = self.recorder, recorder
        try:
            yield
        finally:
            self.recorder = before

    @property
    def editing(self) -> Session | None:
        """The session of this forward; None outside of forwards and in passes that only observe."""
        return None if self.session is None or self.session.plain else self.session

    def wing(self, cls: type[W]) -> W | None:
        """The wing of this class, if a method needs it."""
        return next((w for w in self.wings if isinstance(w, cls)), None)

    def classify(self, ids: torch.Tensor | None, embeds: torch.Tensor | None = None) -> torch.Tensor:
        """[B, q] TEXT or VISUAL, from the token ids or, without them, from the embeddings."""
        if ids is not None:
            return torch.isin(ids, self.tokens.to(ids.device)).to(torch.uint8) * (VISUAL - TEXT) + TEXT
        assert embeds is not None
        vectors = self.model.get_input_embeddings()(self.tokens.to(embeds.device))
        return (embeds[:, :, None] == vectors).all(-1).any(-1).to(torch.uint8) * (VISUAL - TEXT) + TEXT

    def warn_once(self, methods: Sequence[Method], reason: str, what: str = "changed nothing in this call") -> None:
        """Tell the user why methods changed nothing, or what else they did not do, once for each."""
        said = f"{what}: {reason}"
        new = [m for m in methods if (m, said) not in self.warned]
        self.warned.update((m, said) for m in new)
        if new:
            warnings.warn(f"{', '.join(m.name for m in new)} {said}", stacklevel=4)

    def has_image(self, ids: torch.Tensor) -> bool:
        """True if a prompt contains an image token."""
        return bool(torch.isin(ids, self.tokens.to(ids.device)).any())


def bare(model: Any) -> Any:
    """The Hugging Face model inside a PEFT model, a pipeline, one from `torch.compile` or a data-parallel one, which keep it
    as it is."""
    while True:
        own = getattr(model, "__dict__", {})
        inside = own.get("_modules", {})
        if "_orig_mod" in inside:
            model = inside["_orig_mod"]
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            model = model.module
        elif hasattr(type(model), "get_base_model"):
            model = model.get_base_model()
        elif not isinstance(model, torch.nn.Module) and isinstance(own.get("model"), torch.nn.Module):
            model = model.model
        else:
            return model


def installed(model: Any) -> Any:
    """The engine on a model, None without one."""
    return getattr(bare(model), "__dict__", {}).get(ATTRIBUTE)


def engine_of(model: Any) -> Any:
    """The engine on a wrapped model; VlmFixError without one."""
    engine = installed(model)
    if engine is None:
        raise VlmFixError("this model is not wrapped: call vlm_fix.wrap(model, method) first.")
    return engine


class Wing(ABC):
    """One kind of method on one model. Subclasses register themselves; `order` says when a wing is called."""

    kinds: ClassVar[list[type[Wing]]] = []
    order: ClassVar[int] = 100
    runs: ClassVar[tuple[type[Method], ...]] = (Method,)  # the base classes of the methods it looks for
    own_loop: bool = False  # True if the wing chooses tokens in a loop of its own

    def one_graph(self, rows: int) -> bool:
        """True if a forward of this many query rows can run inside one compiled graph."""
        return False

    def __init__(self, host: Host):
        self.host = host

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Wing.kinds.append(cls)
        Wing.kinds.sort(key=lambda kind: kind.order)

    # The methods below do nothing where a kind has nothing to do.

    @classmethod
    @abstractmethod
    def claim(cls, host: Host) -> Self | None:
        """The wing for `host.active`; None if no method is of this kind."""

    def check(self) -> None:  # noqa: B027
        """Raise VlmFixError for stacks or models that have no meaning, before anything is touched."""

    def install(self) -> Iterable[Any]:
        """Put hooks on the model and yield the handle of each, so that the engine can remove them, whatever fails later."""
        return ()

    def refuse(self, options: GenerateOptions) -> None:  # noqa: B027
        """Raise VlmFixError for options of `generate` that do not go with this kind, before the first token."""

    @contextlib.contextmanager
    def around_generate(self, call: Call, options: GenerateOptions) -> Iterator[None]:
        """Change the options of a call, and clean up after it."""
        yield

    def on_prompt(self, session: Session) -> None:  # noqa: B027
        """Prepare for a prompt with an image, once for each branch."""

    def enter(self, session: Session, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Change the arguments of the multimodal model's forward; None leaves them alone."""
        return None

    def only_in_generate(self) -> Iterator[tuple[Method, str]]:
        """What a forward outside `generate` goes without: methods, each with what it does there, as an infinitive."""
        yield from ()

    def unused(self, session: Session) -> Iterator[tuple[Method, str]]:
        """After a call: methods that changed nothing in it, with the reason."""
        yield from ()


def idle_reason(method: Any, session: Session) -> str:
    """Why an edit changed nothing in a finished session whose prompt has image tokens."""
    return MASKED if method.needs_image and max(session.last_visual, default=-1) < 0 else method.idle_reason


def names_of(methods: Iterable[Method], *kinds: type) -> list[str]:
    """The names of the methods of some kinds."""
    return [m.name for m in methods if isinstance(m, kinds)]
