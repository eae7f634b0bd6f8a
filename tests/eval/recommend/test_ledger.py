"""Steps on disk: nothing is repeated, time goes on, and bad files are told apart."""

from __future__ import annotations

import json
import time

import pytest

from vlm_fix.errors import VlmFixError
from vlm_fix.eval.recommend.ledger import Ledger


def test_a_resumed_search_repeats_no_step_and_keeps_its_time(tmp_path):
    path, done = tmp_path / "a" / "steps.jsonl", []

    def work(value):
        done.append(value)
        time.sleep(0.01)
        return {"value": value, "pair": (1, 2)}

    first = Ledger(path, {"seed": 0})
    given = [first.step(["measure", i], lambda i=i: work(i)) for i in range(3)]
    with path.open("a") as handle:
        handle.write('{"key": ["measure", 3], "seco')  # killed while it wrote
    again = Ledger(path, {"seed": 0}, resume=True)
    assert [again.step(["measure", i], lambda i=i: work(i)) for i in range(3)] == given
    assert done == [0, 1, 2] and given[0]["pair"] == [1, 2]
    assert again.now == first.now >= 0.03
    again.step(["measure", 3], lambda: work(3))
    assert done[-1] == 3 and again.now > first.now
    assert len(path.read_text().splitlines()) == 5


def test_an_earlier_search_is_not_written_over(tmp_path):
    path = tmp_path / "steps.jsonl"
    Ledger(path, {"seed": 3})
    Ledger(path, {"seed": 0}).step(["a"], lambda: 1)  # one that was stopped before its first step is no search
    with pytest.raises(VlmFixError, match="--resume"):
        Ledger(path, {"seed": 0})
    with pytest.raises(VlmFixError, match="seed = 0, not 1"):
        Ledger(path, {"seed": 1}, resume=True)


def test_steps_of_another_search_are_an_error(tmp_path):
    path = tmp_path / "steps.jsonl"
    Ledger(path, {}).step(["measure", "vhr"], lambda: 1)
    with pytest.raises(VlmFixError, match="another version"):
        Ledger(path, {}, resume=True).step(["measure", "pai"], lambda: 1)


def test_a_file_without_settings_is_an_error(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text("nonsense\n")
    with pytest.raises(VlmFixError, match="first line"):
        Ledger(path, {}, resume=True)


def test_without_a_path_steps_are_kept_in_memory_alone():
    ledger = Ledger(None, {})
    assert ledger.step(["a"], lambda: json.loads("[1]")) == [1] and ledger.now >= 0
