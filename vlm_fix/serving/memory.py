"""How much of a machine's memory vLLM may take where it runs on the processor: by default 92 % of all, free or not."""

from __future__ import annotations

import math
import os

DEFAULT, LEFT = 0.92, 0.9  # vLLM's share of all; ours of what is free


def share() -> float | None:
    """The share of all memory that fits into what is free now; None where vLLM's default fits, or its user has chosen."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return None
    import psutil

    memory = psutil.virtual_memory()
    free: float = memory.available / memory.total
    return None if free > DEFAULT else max(0.01, math.floor(100 * LEFT * free) / 100)
