"""Linear layers of two or three rows in float32 on a CPU: the product the other way round takes about the time of one row.

`VLM_FIX_JOINED=0` in the environment turns it off: the branches of a contrast then run one after the other there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ROWS = (2, 3)  # from four on the usual product is as fast


def applies(rows: int, device: torch.device, dtype: torch.dtype) -> bool:
    """True for steps of so many rows: it follows from their number, the device and the type, never from a clock."""
    return rows in ROWS and device.type == "cpu" and dtype == torch.float32 and os.environ.get("VLM_FIX_JOINED") != "0"


class FewRows(TorchFunctionMode):
    """While it is on, linear(x [rows, C], W) is (W x^T)^T, in this thread."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs:
            x, weight, bias = (*args, None)[:3]
            plain = type(weight) in (torch.Tensor, torch.nn.Parameter) and x.dtype == weight.dtype
            if plain and applies(x.shape[:-1].numel(), x.device, x.dtype):
                rows = (weight @ x.reshape(-1, x.shape[-1]).T).T.contiguous().view(*x.shape[:-1], -1)
                return rows if bias is None else rows + bias
        return func(*args, **(kwargs or {}))
