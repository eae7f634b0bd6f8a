"""Chunked prefill of rows whose padding is longer than a chunk: methods that look for the first real token find it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vlm_fix
from tests.support.models import IMAGE, PAD, single
from tests.support.run import VAR_TINY, greedy
from vlm_fix import RowScope, ScoreEdit
from vlm_fix.attention import kernel

SPECS = [f"var:{VAR_TINY}", "var:tau=1.5,min_visual_mass=0,rho=0,layers=0-3", "zerotuning:rate=0.1", "sid:beta=0",
         "gift:alpha=3,source_layer=1,layers=2-3",
         "icd:tokens=11|12|13,beta=0", "pai:alpha=0.5", "dagcd:alpha=6"]  # fmt: skip


def padded(inputs, count):
    """The prompt behind `count` columns of padding."""
    inputs = dict(inputs)
    fill = {"input_ids": PAD, "attention_mask": 0, "mm_token_type_ids": 0}
    for key, value in fill.items():
        if key in inputs:
            inputs[key] = torch.nn.functional.pad(inputs[key], (count, 0), value=value)
    return inputs


@pytest.mark.parametrize("chunk", [5, 11, 30])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s[:40])
def test_padding_longer_than_a_chunk(models, spec, chunk):
    """transformers cannot chunk Qwen2.5-VL's prompts with images."""
    model, alone = models["llava"], single("llava", [1, 2], 1)
    text, more = single("llava", [1], 0), {"suppress_tokens": [IMAGE]}
    with vlm_fix.wrapped(model, spec):
        expected = greedy(model, alone, 4, **more)
        ours = greedy(model, padded(alone, 23), 4, prefill_chunk_size=chunk, **more)
        assert torch.equal(ours[0], expected[0]) and torch.allclose(ours[1], expected[1], atol=1e-4)
        width = alone["input_ids"].shape[1] + 23
        both = [padded(alone, 23), padded(text, width - text["input_ids"].shape[1])]
        batch = {k: torch.cat([b[k] for b in both]) for k in both[0]}
        together = greedy(model, batch, 4, prefill_chunk_size=chunk, **more)
        for row, inputs in enumerate((alone, text)):
            one = greedy(model, inputs, 4, **more)
            assert torch.equal(together[0][row], one[0][0]) and torch.allclose(together[1][row], one[1][0], atol=1e-4)


@dataclass(frozen=True)
class NotesRows(ScoreEdit):
    """Notes where the rows that it is asked about lie, on the device and as the host counts them."""

    name: ClassVar[str] = "notes_rows"
    seen: ClassVar[list[tuple[list[int], list[int]]]] = []

    @property
    def row_scope(self) -> RowScope:
        return RowScope.AFTER_IMAGE

    def edit_scores(self, scores, rows):
        self.seen.append((rows.positions.tolist(), list(rows.numbers)))
        return scores + 0.1 * rows.visual


@pytest.mark.parametrize("memory", [1, 4000, kernel.CHUNK_BYTES])
def test_the_host_knows_where_the_rows_of_a_chunk_lie(models, monkeypatch, memory):
    monkeypatch.setattr(kernel, "CHUNK_BYTES", memory)
    monkeypatch.setattr(NotesRows, "seen", seen := [])
    with vlm_fix.wrapped(models["llava"], NotesRows()):
        greedy(models["llava"], single("llava", [1], 0), 3)
    assert all(counted == positions for positions, counted in seen)
    prompt = [positions for positions, _ in seen if positions[0] < seen[-1][0][0]]
    assert len({tuple(p) for p in prompt}) > (2 if memory == 1 else 0) and (max(map(len, prompt)) > 1) == (memory > 1)
