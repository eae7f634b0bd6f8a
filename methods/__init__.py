"""One file per method; the registry finds them by scanning this folder. `from vlm_fix.methods import PAI` imports one."""

import importlib
from typing import Any

from vlm_fix.index import entries


def __getattr__(name: str) -> Any:
    for entry in entries() or ():
        if entry.cls == name and entry.module.startswith(f"{__name__}."):
            return getattr(importlib.import_module(entry.module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(entry.cls for entry in entries() or () if entry.module.startswith(f"{__name__}."))})
