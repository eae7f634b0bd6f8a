"""The training loop of Picto's models: seeded, resumable, fast on a CPU."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Numbers below the normal range count as zero inside (training makes many, which are slow), as before outside."""
    before = (torch.tensor([1e-39]) * 1).item() == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def mixed_precision(wanted: bool = True) -> torch.autocast:
    """bf16 autocast on processors that multiply bf16 matrices themselves; elsewhere it is many times slower than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=wanted and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fit(
    stage: str,
    modules: list[nn.Module],
    loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
    steps: int,
    lr: float,
    out: Path,
    on_save: Callable[[], None] = lambda: None,
    save_every: float = 120,
    optimizers: list[torch.optim.Optimizer] | None = None,
    autocast: bool = True,
    show: int = 50,
) -> None:
    """Minimise loss_of(step) with warm-up and linear decay; save to out/<stage>.pt now and then, and resume.

    Without `optimizers`, matrices are trained with Muon and the rest with AdamW; `autocast`: to bfloat16; `show`: steps
    from one line of figures to the next.
    """
    named = [(n, p) for m in modules for n, p in m.named_parameters() if p.requires_grad]
    if optimizers is None:
        matrix = [p for n, p in named if p.ndim == 2 and "embed" not in n and "head" not in n]
        other = [p for n, p in named if not any(p is m for m in matrix)]
        optimizers = [torch.optim.AdamW(other, lr=lr / 2, betas=(0.9, 0.98), weight_decay=0.0)]
        if matrix:
            optimizers.append(torch.optim.Muon(matrix, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"))

    def rate(step: int) -> float:
        return min((step + 1) / (0.04 * steps + 1), (steps - step) / (0.7 * steps), 1)

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimizers]
    parts: list[Any] = [*modules, *optimizers, *schedules]
    file, first, spent = out / f"{stage}.pt", 0, 0.0
    if file.exists():
        first, spent, states = torch.load(file, weights_only=True)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
        print(f"{stage}: resumed at step {first}", flush=True)
    began = saved = time.time()
    sums: Counter[str] = Counter()
    for step in range(first, steps):
        with mixed_precision(autocast):
            loss, figures = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        sums.update({**figures, "n": 1})
        if step % show == show - 1 or step + 1 == steps:
            shown = "  ".join(f"{k} {v / sums['n']:.4f}" for k, v in sums.items() if k != "n")
            print(f"{stage} {step + 1}/{steps}  {shown}  {spent + time.time() - began:.0f} s", flush=True)
            sums.clear()
        if time.time() - saved > save_every or step + 1 == steps:
            saved = time.time()
            torch.save((step + 1, spent + saved - began, [p.state_dict() for p in parts]), out / f"{stage}.tmp")
            (out / f"{stage}.tmp").replace(file)
            on_save()
