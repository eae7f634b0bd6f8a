"""Methods that look at or change the language model's inputs, or look at the vision tower: their hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch

from vlm_fix import compiled
from vlm_fix.attention.edits import AttentionEdit
from vlm_fix.attention.preview import Earlier
from vlm_fix.families import get_part
from vlm_fix.method import Method
from vlm_fix.pruning.encoder import capture
from vlm_fix.pruning.kinds import CachePruner, LayerPruner, TokenPruner
from vlm_fix.session import Session
from vlm_fix.wing import Host, Wing


@dataclass(frozen=True)
class InputEdit(Method, ABC):
    """A method that looks at or changes the language model's inputs before each forward."""

    @abstractmethod
    def prepare(self, session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the language model's inputs (`inputs_embeds`, `position_ids`, ...), changed or not."""

    @property
    def prepares(self) -> bool:
        """False if `prepare` does nothing with these parameters."""
        return True

    @property
    def previews(self) -> bool:
        """True if `prepare` runs the language model over the prompt once more; False if it reads the vision tower alone."""
        return self.prepares


class InputWing(Wing):
    """Runs `InputEdit.prepare` before each forward of the language model, after pruners: methods see what is left."""

    order = 70
    runs = (InputEdit,)

    def __init__(self, host: Host):
        super().__init__(host)
        self.methods = [m for m in host.active if isinstance(m, InputEdit) and m.prepares]

    @classmethod
    def claim(cls, host: Host) -> Self | None:
        wing = cls(host)
        return wing if wing.methods else None

    def check(self) -> None:
        self.host.need_image_columns([m.name for m in self.methods if m.needs_image])

    def one_graph(self, rows: int) -> bool:
        return rows == 1

    def install(self) -> Iterable[Any]:
        self.host.callbacks["prepare", 0] = self._moved
        yield self.host.language.register_forward_pre_hook(self._prepare, with_kwargs=True)
        if any(method.previews for method in self.methods):
            yield self.host.language.register_forward_hook(self._whole)

    def _prepare(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        places = kwargs.get("position_ids")
        if places is not None and compiled.tracing(self.host, places.shape[-1]):
            moved = compiled.through(self.host, "prepare", 0, places, places.shape[-1])
            return args, {**kwargs, "position_ids": moved}
        return self._prepare_inputs(args, kwargs)

    @compiled.uncompiled
    def _prepare_inputs(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self.host.editing is None:
            return None
        if self.host.joint:
            return args, self.host.joint.prepare(self.prepared, kwargs)
        return args, self.prepared(self.host.editing, kwargs)

    def _whole(self, module: Any, args: Any, output: Any) -> None:
        """The states of all rows of the forward, also of those that a preview has run."""
        if not compiled.tracing(self.host, output.last_hidden_state.shape[1]):
            self._with_earlier(output)

    @compiled.uncompiled
    def _with_earlier(self, output: Any) -> None:
        if self.host.editing is not None:
            self.host.editing.part(Earlier).before(output)

    def _moved(self, places: torch.Tensor) -> torch.Tensor:
        """The position ids of one row: the only input that methods may change in a compiled forward."""
        assert self.host.session is not None
        return self.prepared(self.host.session, {"position_ids": places})["position_ids"]

    def prepared(self, session: Session, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The language model's inputs as the methods leave them."""
        for method in self.methods:
            if not isinstance(method, AttentionEdit) or method.acts_in(session.branch):
                kwargs = method.prepare(session, kwargs)
        return kwargs


class EncoderWing(Wing):
    """Captures what the vision tower tells methods that are no pruners, into `Call.views`."""

    order = 60
    runs = ()  # it serves methods of other kinds

    def __init__(self, host: Host, layers: tuple[int, ...]):
        super().__init__(host)
        self.layers = layers

    @classmethod
    def claim(cls, host: Host) -> Self | None:
        others = [m for m in host.active if not isinstance(m, TokenPruner | LayerPruner | CachePruner)]
        wanted = [layers for m in others if (layers := m.encoder_layers(host.arch)) is not None]
        return cls(host, tuple(sorted({i for layers in wanted for i in layers}))) if wanted else None

    def one_graph(self, rows: int) -> bool:
        return True

    def install(self) -> Iterable[Any]:
        tower = get_part(self.host.model, self.host.family.vision)
        return capture(self.host, tower, self.layers, into="views")
