"""What pruners need on a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self

from vlm_fix.errors import VlmFixError
from vlm_fix.method import Method
from vlm_fix.options import GenerateOptions
from vlm_fix.session import VISUAL, Session
from vlm_fix.wing import Host, Wing, names_of

from . import after, before, kv
from .columns import ImageColumns
from .kinds import CachePruner, LayerPruner, TokenPruner, share_of
from .pruners import Pruners

CACHES = {
    "offloaded": "an offloaded cache, whose keys leave the device after each layer",
    "quantized": "a quantized cache, which holds codes in place of keys",
    "static": "a static cache",
}


class PruningWing(Wing):
    """Pruners before the language model, inside it and in its cache."""

    order = 10
    runs = (TokenPruner, LayerPruner, CachePruner)

    def __init__(self, host: Host):
        super().__init__(host)

        def first(kind: Any) -> Any:
            return next((m for m in host.active if isinstance(m, kind)), None)

        self.pruners = Pruners(host, first(TokenPruner), first(LayerPruner), first(CachePruner))

    @classmethod
    def claim(cls, host: Host) -> Self | None:
        wing = cls(host)
        return wing if wing.pruners.all else None

    def check(self) -> None:
        names = names_of(self.host.active, TokenPruner, LayerPruner)
        if len(names) > 1:
            raise VlmFixError(
                f"{' and '.join(names)} {'both' if len(names) == 2 else 'all'} prune tokens; use one of them at a time."
            )
        self.host.need_all_heads(names_of(self.host.active, LayerPruner, CachePruner))
        self.host.need_image_columns(names_of(self.host.active, *self.runs))
        cachers = names_of(self.host.active, CachePruner)
        others = [m.name for m in self.host.active if isinstance(m, LayerPruner) or getattr(m, "tracks_columns", False)]
        if cachers and len(cachers + others) > 1:
            raise VlmFixError(
                f"{cachers[0]} leaves each layer other columns after the prompt, which {(cachers[1:] + others)[0]} does "
                "not follow; use one of them at a time."
            )

    def install(self) -> Iterable[Any]:
        host, pruners = self.host, self.pruners
        before.check(pruners)
        if pruners.dropper:
            after.check(host, pruners.dropper)
        if pruners.cacher:
            kv.check(host, pruners.cacher)
        yield from before.install(pruners)
        if pruners.dropper:
            yield from after.install(host, pruners.dropper)
        if pruners.cacher:
            yield from kv.install(host, pruners.cacher)

    def refuse(self, options: GenerateOptions) -> None:
        wanders = self.pruners.cacher is not None and self.pruners.cacher.wanders
        kind = options.cache_kind
        inside = self.pruners.dropper or self.pruners.cacher  # these look into the cache
        taken = ("dynamic",) if inside else ("dynamic", "offloaded", "quantized", "static")
        for name, used in {
            "assisted decoding": options.assisted,
            CACHES.get(kind, f"a cache of kind {kind}"): kind not in taken,
            "chunked prefill": options.setting("prefill_chunk_size"),
            "a cache of an earlier turn": options.kept is not None,
            "beams": wanders and options.beams > 1,
            "a decoding loop of a method": wanders and any(w.own_loop for w in self.host.wings),
        }.items():
            if used:
                raise VlmFixError(f"{self.pruners.all[0].name} does not work with {name}; drop that option.")

    def unused(self, session: Session) -> Iterator[tuple[Method, str]]:
        for pruner in self.pruners.all:
            if getattr(pruner, "keep", 1) != 1 and not self._drops(pruner, session):
                yield pruner, "its keep covers every image token; lower it."

    def _drops(self, pruner: Method, session: Session) -> bool:
        """False if the finished call still has all the image tokens that `pruner` may drop (True without an image)."""
        images = int((session.types == VISUAL).sum())
        if not images:
            return True
        token_pruner = self.pruners.pruner
        if pruner is token_pruner and session.kept is not None:
            return True
        if pruner not in (self.pruners.dropper, self.pruners.cacher):
            return False
        if isinstance(pruner, CachePruner) and pruner.rewrites:
            shown = session.part(ImageColumns).images
            largest = max(int((shown == i).sum(dim=1).max()) for i in range(1, int(shown.max()) + 1))
            return share_of(pruner.keep, largest) < largest
        return any(int((view.types == VISUAL).sum()) < images for view in session.views.values())
