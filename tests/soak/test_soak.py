"""A short form of `python -m tests.soak`: too few calls for a figure of memory, enough to see that the program works."""

from __future__ import annotations

from . import calls


def test_answers_after_others_are_those_of_a_fresh_process():
    answering = calls.Answering()
    plan = calls.planned(["baseline", "pai", "vcd", "hiprune:keep=16", "vhr", "dola"], 9, seed=3)
    mine = [answering(call) for call in plan]
    assert all(isinstance(answer, list) for answer in mine)
    assert calls.fresh(plan[4:]) == mine[4:]
