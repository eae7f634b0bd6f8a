"""Which session belongs to which KV cache: the cache itself carries it, and so does a copy of the cache."""

from __future__ import annotations

import weakref
from typing import Any

from vlm_fix.session import Session

ATTRIBUTE = "_vlm_fix_session"


class Held:
    """What a cache carries. copy.deepcopy gives the copy a session of its own; a pickled cache goes without."""

    def __init__(self, owner: weakref.ref[Sessions], session: Session):
        self.owner, self.session = owner, session

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        return Held(self.owner, self.session.copied())

    def __reduce__(self) -> Any:
        return type(None), ()


class Sessions:
    """The sessions of one wrapped model, by KV cache. They end with their caches."""

    def get(self, cache: Any) -> Session | None:
        """The session of `cache`; None without one, or if another wrapping filled it."""
        held = vars(cache).get(ATTRIBUTE)
        if not isinstance(held, Held) or held.owner() is not self:
            return None
        held.session.cache = weakref.ref(cache)
        return held.session

    def __contains__(self, cache: Any) -> bool:
        return self.get(cache) is not None

    def __getitem__(self, cache: Any) -> Session:
        session = self.get(cache)
        if session is None:
            raise KeyError("this cache has no session")
        return session

    def __setitem__(self, cache: Any, session: Session) -> None:
        session.cache = weakref.ref(cache)
        setattr(cache, ATTRIBUTE, Held(weakref.ref(self), session))
